"""Baichuan and Baichuan2, 7B and 13B (Yang et al., Baichuan 2, 2023)."""
