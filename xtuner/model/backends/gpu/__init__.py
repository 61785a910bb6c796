"""Fast paths for training on a GPU."""
