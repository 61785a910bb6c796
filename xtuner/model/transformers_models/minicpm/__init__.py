"""MiniCPM 1 and 2 (Hu et al., MiniCPM, 2024)."""
