"""InternViT, the visual encoder of InternVL (Chen et al., InternVL, 2023)."""
