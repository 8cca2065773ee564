"""Forward passes in Triton for CUDA: weights in merged buffers, one attention kernel for the whole ragged batch."""
