"""What this machine can run, and what the given config would take: from the checks that a run makes itself."""
