"""Fast paths for training on a CPU."""
