"""Offline LLM inference throughput harness on DeepSpeed: one config, one launch, one row of results."""

__version__ = "0.1.0"
