"""InternLM2 and InternLM2.5 (Cai et al., InternLM2 Technical Report, 2024)."""
