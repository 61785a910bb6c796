"""DeepSeekMoE 16B (Dai et al., DeepSeekMoE, 2024)."""
