"""FastGen's scheduler over a cost model: not built yet."""
