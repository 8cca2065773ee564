"""What ``python -m harness.compare`` does: runs read, grouped, set against a baseline, and shown."""
