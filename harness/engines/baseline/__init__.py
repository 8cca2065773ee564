"""The committee's loop."""
