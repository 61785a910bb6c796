"""InternLM, the first version (2023)."""
