"""What ``python -m harness.verify`` and ``verify=N`` share: recounting a run, comparing two, judging tokens."""
