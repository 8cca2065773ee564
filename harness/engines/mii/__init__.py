"""The stock DeepSpeed-MII pipeline, made comparable."""
