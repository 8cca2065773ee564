"""One rank's life, one launch, many runs."""
