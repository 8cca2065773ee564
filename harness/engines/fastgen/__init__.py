"""Dynamic SplitFuse: a scheduler in plain Python over a runner that makes one ragged forward a pass."""
