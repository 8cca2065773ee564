"""An engine that dies, or never comes back: nothing in our own code knows of it; see tests/test_sweep.py."""
