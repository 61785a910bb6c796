"""Rotary position embeddings (Su et al., RoFormer, 2021), scaled or not.

The cosines and sines are made at every call from the configuration alone. There is no buffer that
could be left uninitialised by loading or be rounded by a cast, and with ``dynamic`` scaling the
result does not depend on the rows that came before.

Shapes: B batch, S tokens, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


def sample_lengths(position_ids: Tensor) -> Tensor:
    """(B, S) the length of each token's sample, given its (B, S) position in it.

    A sample begins where the position is 0; it is as long as its largest position says.
    """
    samples = (position_ids == 0).cumsum(-1)
    longest = position_ids.new_zeros(len(samples), samples.shape[-1] + 1)
    longest.scatter_reduce_(1, samples, position_ids, "amax")
    return longest.gather(1, samples) + 1


class RotaryEmbedding(nn.Module):
    """Cosines and sines of the positions, by ``config.rope_parameters``.

    ``dynamic`` scaling (NTK-aware) depends on the length of each sample, as if it were alone: its
    largest position plus one, but no less than ``config.max_position_embeddings``.

    Args:
        config: the model's; ``rope_type`` and ``rope_theta`` are read from ``rope_parameters``.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.rope_type: str = config.rope_parameters["rope_type"]

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Compute them in float32.

        Args:
            x: any tensor of the device and number format of the result.
            position_ids: (B, S), or (1, S) for all rows.

        Returns:
            Cosines and sines, each (B, S, D); the second half repeats the first.
        """
        frequencies, scale = self.frequencies(position_ids)
        with torch.autocast(x.device.type, enabled=False):
            angles = position_ids[..., None].float() * frequencies
            angles = torch.cat((angles, angles), dim=-1)
            cos, sin = angles.cos() * scale, angles.sin() * scale
        return cos.to(x.dtype), sin.to(x.dtype)

    def frequencies(self, position_ids: Tensor) -> tuple[Tensor, float]:
        """(D / 2,) or (B, S, D / 2) angles per position, and the factor on cosines and sines."""
        device = position_ids.device
        if self.rope_type == "dynamic":
            lengths = sample_lengths(position_ids)[..., None]
            return ROPE_INIT_FUNCTIONS["dynamic"](self.config, device, seq_len=lengths)
        if self.rope_type != "default":
            compute = ROPE_INIT_FUNCTIONS[self.rope_type]
            return compute(self.config, device, seq_len=position_ids.max() + 1)
        config = self.config
        width = getattr(config, "head_dim", None)
        width = width or config.hidden_size // config.num_attention_heads
        exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0
