"""The engines: requests into completions."""
