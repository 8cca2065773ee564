"""What a model costs: bytes of memory, operations, seconds of a pass. Plain sums, nothing heavy imported."""
