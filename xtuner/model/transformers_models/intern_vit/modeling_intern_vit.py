"""InternViT: a vision transformer whose residual branches are scaled by a learnt vector.

Names of modules and tensors are the hub's, so that its weights and adapters fit as they are.

Shapes: T images, P patches of an image, S = P + 1 tokens (the class token is first), C width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm, eager_attention_forward
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from xtuner.model.transformers_models.intern_vit.configuration_intern_vit import InternVisionConfig

NORMS: dict[str, Callable[..., nn.Module]] = {
    "rms_norm": LlamaRMSNorm,
    "layer_norm": nn.LayerNorm,
}


class InternVisionEmbeddings(nn.Module):
    """Patches, and their places in an image of any size."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.side = config.image_size // config.patch_size
        width = config.hidden_size
        self.class_embedding = nn.Parameter(torch.randn(1, 1, width))
        self.patch_embedding = nn.Conv2d(
            config.num_channels, width, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Parameter(torch.randn(1, self.side**2 + 1, width))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(T, 3, height, width) to (T, S, C)."""
        patches = self.patch_embedding(pixel_values)
        places = self._places(*patches.shape[-2:]).to(patches.dtype)
        first = self.class_embedding.expand(len(patches), 1, -1).to(patches.dtype)
        return torch.cat((first, patches.flatten(2).transpose(1, 2)), dim=1) + places

    def _places(self, height: int, width: int) -> Tensor:
        """(1, S, C): those of the configured size, interpolated where the image has another one."""
        if (height, width) == (self.side, self.side):
            return self.position_embedding
        first, grid = self.position_embedding.split((1, self.side**2), dim=1)
        grid = grid.float().transpose(1, 2).unflatten(2, (self.side, self.side))
        grid = nn.functional.interpolate(grid, (height, width), mode="bicubic")
        return torch.cat((first, grid.flatten(2).transpose(1, 2).to(first.dtype)), dim=1)


class InternAttention(nn.Module):
    """Attention in which each patch sees all others."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.head_dim = width // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.num_key_value_groups = 1
        self.is_causal = False
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        if config.qk_normalization:
            self.q_norm = LlamaRMSNorm(width, eps=config.layer_norm_eps)
            self.k_norm = LlamaRMSNorm(width, eps=config.layer_norm_eps)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(config.dropout)

    def forward(self, hidden_states: Tensor, **kwargs: object) -> tuple[Tensor, Tensor | None]:
        """(T, S, C) to (T, S, C), and the attention function's weights."""
        query, key, value = self.qkv(hidden_states).chunk(3, dim=-1)
        if self.config.qk_normalization:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (query, key, value)
        )
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        out, weights = attend(
            self, query, key, value, None, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.proj_drop(self.proj(out.flatten(2))), weights


class InternMLP(nn.Module):
    """Two layers with an activation between them."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.act = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(T, S, C) to (T, S, C)."""
        return self.fc2(self.act(self.fc1(hidden_states)))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016): in training, a branch is left out for some images."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """(T, S, C) to (T, S, C)."""
        if not self.training or not self.rate:
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.rate
        return branch * (kept / (1.0 - self.rate)).to(branch.dtype)


class InternVisionEncoderLayer(GradientCheckpointingLayer):
    """Attention and MLP, each after a norm, scaled, and added to its input."""

    def __init__(self, config: InternVisionConfig, drop_path_rate: float) -> None:
        super().__init__()
        norm, width = NORMS[config.norm_type], config.hidden_size
        self.attn = InternAttention(config)
        self.mlp = InternMLP(config)
        self.norm1 = norm(width, eps=config.layer_norm_eps)
        self.norm2 = norm(width, eps=config.layer_norm_eps)
        self.ls1 = nn.Parameter(config.initializer_factor * torch.ones(width))
        self.ls2 = nn.Parameter(config.initializer_factor * torch.ones(width))
        self.drop_path1, self.drop_path2 = DropPath(drop_path_rate), DropPath(drop_path_rate)

    def forward(self, hidden_states: Tensor, **kwargs: object) -> Tensor:
        """(T, S, C) to (T, S, C)."""
        dtype = hidden_states.dtype
        attended, _ = self.attn(self.norm1(hidden_states).to(dtype), **kwargs)
        hidden_states = hidden_states + self.drop_path1(attended * self.ls1)
        branch = self.mlp(self.norm2(hidden_states).to(dtype)) * self.ls2
        return hidden_states + self.drop_path2(branch)


class InternVisionEncoder(nn.Module):
    """The layers; the deeper one is, the more often its branches are left out in training."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        count = config.num_hidden_layers
        self.layers = nn.ModuleList(
            InternVisionEncoderLayer(config, config.drop_path_rate * place / max(1, count - 1))
            for place in range(count)
        )
        self.gradient_checkpointing = False

    def forward(self, hidden_states: Tensor, **kwargs: object) -> Tensor:
        """(T, S, C) to (T, S, C)."""
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        return hidden_states


class InternVisionModel(PreTrainedModel):
    """The visual encoder."""

    config_class = InternVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    base_model_prefix = "vision_model"
    supports_gradient_checkpointing = True
    _input_embed_layer = "patch_embedding"
    _no_split_modules = ["InternVisionEncoderLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": InternVisionEncoderLayer,
        "attentions": InternAttention,
    }

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__(config)
        self.embeddings = InternVisionEmbeddings(config)
        self.encoder = InternVisionEncoder(config)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(self, pixel_values: Tensor, **kwargs: object) -> BaseModelOutputWithPooling:
        """See.

        Args:
            pixel_values: (T, 3, height, width).
            **kwargs: ``output_hidden_states``, and keywords of the attention function.

        Returns:
            ``last_hidden_state`` (T, S, C) and ``pooler_output`` (T, C), its class token; of the
            ``hidden_states`` the first are those before any layer.
        """
        hidden = self.encoder(self.embeddings(pixel_values), **kwargs)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=hidden[:, 0])
