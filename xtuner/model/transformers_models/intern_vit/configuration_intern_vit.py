"""The configuration of InternViT."""

from __future__ import annotations

from xtuner.model.transformers_models.hub_config import HubConfig


class InternVisionConfig(HubConfig):
    """Settings of an InternViT, under the names of the hub's ``config.json``.

    ``norm_type`` is ``rms_norm`` (6B) or ``layer_norm`` (300M); with ``qk_normalization`` queries
    and keys are normalised over all heads before attention.
    """

    model_type = "intern_vit_6b"
    base_config_key = "vision_config"

    num_channels: int = 3
    patch_size: int = 14
    image_size: int = 224
    qkv_bias: bool = False
    hidden_size: int = 3200
    num_attention_heads: int = 25
    intermediate_size: int = 12800
    qk_normalization: bool = True
    num_hidden_layers: int = 48
    use_flash_attn: bool = True
    hidden_act: str = "gelu"
    norm_type: str = "rms_norm"
    layer_norm_eps: float = 1e-6
    dropout: float = 0.0
    drop_path_rate: float = 0.0
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    initializer_factor: float = 0.1
