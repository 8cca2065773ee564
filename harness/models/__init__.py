"""Models found, described and loaded."""
