"""InternVL: an InternViT, a projector ``mlp1``, and a language model that reads image features.

Names of modules and tensors are the hub's, so that its weights and adapters fit as they are.

Shapes: B rows, S tokens, T tiles (images of one size), P features of a tile, H width of the
language model, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from xtuner.model.transformers_models.intern_vit.modeling_intern_vit import InternVisionModel
from xtuner.model.transformers_models.internvl_chat.configuration_internvl_chat import (
    InternVLChatConfig,
)


class InternVLChatModel(PreTrainedModel):
    """The whole model.

    Attributes:
        img_context_token_id: the token whose places image features take; set it before a call with
            images, by the tokenizer's ``<IMG_CONTEXT>``.
    """

    config_class = InternVLChatConfig
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]
    base_model_prefix = "language_model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["InternVisionEncoderLayer", "InternLM2DecoderLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: InternVLChatConfig) -> None:
        super().__init__(config)
        self.vision_model = InternVisionModel._from_config(config.vision_config)
        self.language_model = AutoModelForCausalLM.from_config(
            config.llm_config, trust_remote_code=False
        )
        self.shrink = round(1 / config.downsample_ratio)
        wide = config.vision_config.hidden_size * self.shrink**2
        narrow = config.llm_config.hidden_size
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(wide), nn.Linear(wide, narrow), nn.GELU(), nn.Linear(narrow, narrow)
        )
        self.img_context_token_id: int | None = None
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def extract_feature(self, pixel_values: Tensor) -> Tensor:
        """(T, 3, height, width) to (T, P, H)."""
        last = self.config.select_layer == -1
        seen = self.vision_model(pixel_values, output_hidden_states=not last)
        hidden = seen.last_hidden_state if last else seen.hidden_states[self.config.select_layer]
        patches = hidden[:, 1:]
        side = round(patches.shape[1] ** 0.5)
        return self.mlp1(self.pixel_shuffle(patches.unflatten(1, (side, side))).flatten(1, 2))

    def pixel_shuffle(self, grid: Tensor) -> Tensor:
        """(T, rows, columns, C) to (T, rows / r, columns / r, C r²): each r x r patches as one."""
        tiles, rows, columns, width = grid.shape
        factor = self.shrink
        grid = grid.view(tiles, rows, columns // factor, width * factor).transpose(1, 2)
        grid = grid.reshape(tiles, columns // factor, rows // factor, width * factor**2)
        return grid if self.config.ps_version == "v1" else grid.transpose(1, 2)

    def embed(self, input_ids: Tensor, features: Tensor | None) -> Tensor:
        """(B, S, H): the tokens' embeddings, and the features of all tiles in their places.

        Args:
            input_ids: (B, S).
            features: (T, P, H); None without images.

        Raises:
            ValueError: when there are more places than features, or fewer.
        """
        embedded: Tensor = self.language_model.get_input_embeddings()(input_ids)
        if features is None:
            return embedded
        flat = features.flatten(0, 1).to(embedded.dtype)
        places = torch.eq(input_ids, self.img_context_token_id or -1)
        if int(places.sum()) != len(flat):
            raise ValueError(f"{int(places.sum())} places for {len(flat)} image features")
        return embedded.masked_scatter(places[..., None], flat)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        image_flags: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> CausalLMOutputWithPast:
        """Compute logits (B, S, V), and the loss where there are ``labels``.

        Args:
            pixel_values: (T, 3, height, width); None without images.
            input_ids: (B, S).
            image_flags: (T,) or (T, 1), 1 where a tile is one; 0 where it only fills the batch.
            inputs_embeds: (B, S, H), in place of all of these.
            **kwargs: of the language model.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give either input_ids or inputs_embeds")
            features = None if pixel_values is None else self.extract_feature(pixel_values)
            if features is not None and image_flags is not None:
                features = features[image_flags.flatten() == 1]
            inputs_embeds = self.embed(input_ids, features)
        return self.language_model(inputs_embeds=inputs_embeds, **kwargs)

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None,
        input_ids: Tensor,
        visual_features: Tensor | None = None,
        **kwargs: object,
    ) -> Any:
        """Go on with a text about images.

        Args:
            pixel_values: (T, 3, height, width); None without images.
            input_ids: (B, S).
            visual_features: (T, P, H), in place of ``pixel_values``.
            **kwargs: of ``generate`` of the language model.

        Returns:
            The new tokens alone, as the language model saw embeddings.
        """
        if visual_features is None and pixel_values is not None:
            visual_features = self.extract_feature(pixel_values)
        embedded = self.embed(input_ids, visual_features)
        return self.language_model.generate(inputs_embeds=embedded, **kwargs)
