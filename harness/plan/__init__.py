"""Says before a run what a model needs of a machine, what it can reach there, and how far a real run was from it."""
