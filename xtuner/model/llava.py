"""LLaVA: a visual encoder and a projector in front of a language model."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xtuner.model.activation_checkpointing import enable_activation_checkpointing
from xtuner.model.backends.environment import waits_for
from xtuner.model.loading import build_llm, init_from_checkpoint
from xtuner.model.modules.images import (
    find_images,
    freeze_unseen_layers,
    has_class_token,
    merge_images,
    visual_features,
)
from xtuner.model.modules.projector import ProjectorConfig, ProjectorModel
from xtuner.model.vision_language import (
    VisionLanguageModel,
    build,
    with_adapter,
    with_zero_gradient,
)
from xtuner.utils.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LLaVAModel(VisionLanguageModel):
    """Trains a projector, and where asked the language model and the visual encoder, or adapters.

    Args:
        llm: the language model, or its config.
        visual_encoder: CLIP, SigLIP or the like, or its config.
        freeze_llm: leave the language model as it is; it may still get an adapter.
        freeze_visual_encoder: likewise.
        visual_select_layer: which hidden states of the visual encoder are taken.
        pretrained_pth: a checkpoint to begin with, such as the one of pretraining: a file, or a
            folder of DeepSpeed or FSDP.
        projector_depth: linear layers of the projector.
        llm_lora: adapter of the language model.
        visual_encoder_lora: adapter of the visual encoder.
        use_activation_checkpointing: recompute activations in the backward pass instead of storing
            them, see ``Checkpointing``.
        max_position_embeddings: extend the context of the language model to this length.
        use_varlen_attn: rows are packed; their samples do not see each other.
        tokenizer: saved with the converted model.

    Raises:
        UserError: when ``pretrained_pth`` cannot be used.
    """

    lengthens_rows = True
    save_formats = ("xtuner", "huggingface", "official")

    def __init__(
        self,
        llm: Any,
        visual_encoder: Any,
        freeze_llm: bool = False,
        freeze_visual_encoder: bool = False,
        visual_select_layer: int = -2,
        pretrained_pth: str | None = None,
        projector_depth: int = 2,
        llm_lora: Any = None,
        visual_encoder_lora: Any = None,
        use_activation_checkpointing: bool | Mapping[str, Any] = True,
        max_position_embeddings: int | None = None,
        use_varlen_attn: bool = False,
        tokenizer: Any = None,
    ) -> None:
        full = llm_lora is None and not freeze_llm  # only then it has to be kept in float32
        super().__init__(
            build_llm(llm, full=full, max_position_embeddings=max_position_embeddings),
            lora=llm_lora,
            use_activation_checkpointing=use_activation_checkpointing,
            use_varlen_attn=use_varlen_attn,
            tokenizer=tokenizer,
        )
        self.freeze_llm, self.freeze_visual_encoder = freeze_llm, freeze_visual_encoder
        if freeze_llm and llm_lora is None:
            self.llm.requires_grad_(False)
        self.visual_encoder = build(visual_encoder)
        self.visual_select_layer = visual_select_layer
        if freeze_visual_encoder or visual_encoder_lora is not None:
            self.visual_encoder.requires_grad_(False)
        if visual_encoder_lora is not None:
            self.visual_encoder = with_adapter(self.visual_encoder, visual_encoder_lora)
        freeze_unseen_layers(self.visual_encoder, visual_select_layer)
        trained = any(weight.requires_grad for weight in self.visual_encoder.parameters())
        if trained:
            enable_activation_checkpointing(self.visual_encoder, use_activation_checkpointing)
        self.projector = ProjectorModel(
            ProjectorConfig(
                visual_hidden_size=_vision_config(self.visual_encoder).hidden_size,
                llm_hidden_size=self.llm.config.get_text_config().hidden_size,
                depth=projector_depth,
            )
        )
        if pretrained_pth is not None:
            init_from_checkpoint(self, pretrained_pth)

    def prepare_batch(self, data: Batch, device: torch.device) -> Batch:
        """Find the image tokens before a GPU would have to be asked for them."""
        return {**data, "image_places": find_images(data)} if waits_for(device) else data

    def with_images(self, data: Batch) -> Batch:
        """Merge the features of images; see ``VisionLanguageModel``."""
        images = data.get("pixel_values")
        if images is not None and len(images):
            features = self._features(images)
            return merge_images(data, features, self.llm.get_input_embeddings())
        features = self._features(self._blank_image())
        merged = merge_images(data, features[:0], self.llm.get_input_embeddings())
        merged["inputs_embeds"] = with_zero_gradient(merged["inputs_embeds"], features)
        return merged

    def _features(self, pixel_values: Tensor) -> Tensor:
        """(N, P, H) of (N, 3, H, W)."""
        seen = visual_features(self.visual_encoder, pixel_values, self.visual_select_layer)
        projected: Tensor = self.projector(seen.to(self.projector.dtype))
        return projected

    def encode_blank(self, side: int) -> tuple[Callable[[], object], int]:
        """See ``VisionLanguageModel``."""
        config = _vision_config(self.visual_encoder)
        image = torch.zeros(1, 3, config.image_size, config.image_size)
        tokens = (config.image_size // config.patch_size) ** 2
        return functools.partial(self._features, image), tokens

    def _blank_image(self) -> Tensor:
        size = _vision_config(self.visual_encoder).image_size
        return torch.zeros(1, 3, size, size, device=next(self.projector.parameters()).device)

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, pixel_values: Tensor | None = None, **settings: Any
    ) -> Tensor:
        """Answer a question about images.

        Args:
            input_ids: (1, S) with ``IMAGE_TOKEN_INDEX``.
            pixel_values: (N, 3, H, W).
            **settings: of transformers' ``generate``.

        Returns:
            (1, T) the ids of the answer alone.
        """
        settings.pop("attention_mask", None)
        data: Batch = {"input_ids": input_ids}
        if pixel_values is not None:
            data["pixel_values"] = pixel_values
        merged = self.with_images(data)
        mask = torch.ones(merged["inputs_embeds"].shape[:2], device=input_ids.device)
        answer: Tensor = self.llm.generate(
            inputs_embeds=merged["inputs_embeds"], attention_mask=mask.long(), **settings
        )
        return answer

    def to_hf(
        self,
        save_dir: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        safe_serialization: bool = True,
        max_shard_size: int | str = "2GB",
        save_format: str = "xtuner",
    ) -> None:
        """Write what was trained, or the whole model in another project's form.

        Args:
            save_dir: the folder.
            dtype: of the weights; as they are when None.
            safe_serialization: kept from v0.1; transformers 5 writes safetensors only.
            max_shard_size: of a file.
            save_format: ``xtuner`` (``projector/``, ``llm_adapter/``, ``visual_encoder_adapter/``,
                ``visual_encoder/``, and the language model itself where it was trained),
                ``huggingface`` (``LlavaForConditionalGeneration``) or ``official`` (LLaVA's own).
        """
        from xtuner.model.modules import llava_formats

        llava_formats.FORMATS[save_format](self, Path(save_dir), dtype, max_shard_size)

    @property
    def drops_class_token(self) -> bool:
        """Whether the encoder's first feature is left out."""
        return has_class_token(self.visual_encoder)


def _vision_config(visual_encoder: PreTrainedModel) -> Any:
    config = visual_encoder.config
    return getattr(config, "vision_config", config)
