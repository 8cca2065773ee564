"""One forward pass over a ragged batch: whose kernels compute it."""
