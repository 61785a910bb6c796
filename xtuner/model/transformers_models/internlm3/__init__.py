"""InternLM3 (2025)."""
