"""Training steps on fake CUDA tensors, for a CUDA build of torch on a machine without a GPU."""
