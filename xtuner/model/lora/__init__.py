"""LoRA: fused adapter layers, adapters on experts, merging."""
