"""Who the ranks of a launch are, how they meet and share the work."""
