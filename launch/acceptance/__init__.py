"""The acceptance suite: proves and measures on one machine, in stages, what the harness claims. See README.md here."""
