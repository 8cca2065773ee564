"""DeepSpeed's ``init_inference`` over static batches."""
