"""FastGen's scheduler over a model of how long a pass takes."""
