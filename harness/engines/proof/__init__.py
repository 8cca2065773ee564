"""No engine is trusted: its logits are compared with Hugging Face's before the clock starts."""
