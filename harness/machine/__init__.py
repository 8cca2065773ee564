"""What this machine is, and how it does while a run lasts."""
