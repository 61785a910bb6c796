"""InternVL 1.5 and later (Chen et al., How Far Are We to GPT-4V?, 2024)."""
