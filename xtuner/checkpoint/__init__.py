"""Checkpoints of training runs: saving, loading, verifying, resuming."""
