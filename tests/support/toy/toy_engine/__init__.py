"""An engine from outside the package, as somebody else would write one; see tests/test_engine_rooms.py."""
