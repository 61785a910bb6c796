"""Qwen of 2023, the first generation (Bai et al., Qwen Technical Report, 2023)."""
