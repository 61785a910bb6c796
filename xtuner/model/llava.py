"""LLaVA: a visual encoder and a projector in front of a language model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xtuner.model.base import Data
from xtuner.model.loading import build_llm, init_from_checkpoint
from xtuner.model.modules.images import (
    freeze_unseen_layers,
    has_class_token,
    merge_images,
    visual_features,
)
from xtuner.model.modules.projector import ProjectorConfig, ProjectorModel
from xtuner.model.sft import SupervisedFinetune
from xtuner.registry import BUILDER


class LLaVAModel(SupervisedFinetune):
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
        use_activation_checkpointing: compute activations twice instead of keeping them.
        max_position_embeddings: length to stretch the language model to.
        use_varlen_attn: rows are packed; their samples do not see each other.
        tokenizer: saved with the converted model.

    Raises:
        UserError: when ``pretrained_pth`` cannot be used.
    """

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
        use_activation_checkpointing: bool = True,
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
        self.visual_encoder = built(visual_encoder)
        self.visual_select_layer = visual_select_layer
        if freeze_visual_encoder or visual_encoder_lora is not None:
            self.visual_encoder.requires_grad_(False)
        if visual_encoder_lora is not None:
            self.visual_encoder = with_adapter(self.visual_encoder, visual_encoder_lora)
        freeze_unseen_layers(self.visual_encoder, visual_select_layer)
        trained = any(weight.requires_grad for weight in self.visual_encoder.parameters())
        if use_activation_checkpointing and trained:
            self.visual_encoder.gradient_checkpointing_enable({"use_reentrant": False})
        self.projector = ProjectorModel(
            ProjectorConfig(
                visual_hidden_size=_vision_config(self.visual_encoder).hidden_size,
                llm_hidden_size=self.llm.config.get_text_config().hidden_size,
                depth=projector_depth,
            )
        )
        if pretrained_pth is not None:
            init_from_checkpoint(self, pretrained_pth)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The weights that are trained."""
        state = nn.Module.state_dict(self, *args, **kwargs)
        prefix = str(kwargs.get("prefix", ""))
        trained = {name for name, weight in self.named_parameters() if weight.requires_grad}
        return {
            name: value for name, value in state.items() if name.removeprefix(prefix) in trained
        }

    def forward(
        self,
        data: Data,
        data_samples: Any = None,
        mode: str = "loss",
        num_items_in_batch: Mapping[str, int] | None = None,
    ) -> Any:
        """As ``SupervisedFinetune``, images included.

        Args:
            data: a batch with ``IMAGE_TOKEN_INDEX`` in ``input_ids`` and ``pixel_values``
                (N, 3, H, W): N images in the order of their tokens.
            data_samples: unused.
            mode: ``loss``, ``predict`` or ``tensor``.
            totals: denominators of the mean; the micro-batch's own when None.
        """
        if mode == "loss" and num_items_in_batch is None:
            num_items_in_batch = self.num_items(data)
        return super().forward(self.with_images(data), data_samples, mode, num_items_in_batch)

    def with_images(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with the features of its images in the places of their tokens."""
        given = data.get("pixel_values")
        blank = given is None or not len(given)
        pixel_values: Tensor = self._blank_image() if blank else given  # type: ignore[assignment]
        features = self._features(pixel_values)
        embeddings = self.llm.get_input_embeddings()
        merged = merge_images(data, features[:0] if blank else features, embeddings)
        if blank:  # every trained weight gets a gradient, if of zeros: other processes wait for it
            merged["inputs_embeds"] = merged["inputs_embeds"] + features.sum() * 0.0
        return merged

    def _features(self, pixel_values: Tensor) -> Tensor:
        """(N, P, H) of (N, 3, H, W)."""
        seen = visual_features(self.visual_encoder, pixel_values, self.visual_select_layer)
        projected: Tensor = self.projector(seen.to(self.projector.dtype))
        return projected

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
        merged = self.with_images({"input_ids": input_ids, "pixel_values": pixel_values})
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
        max_shard_size: str = "2GB",
        save_format: str = "xtuner",
    ) -> None:
        """Write what was trained, or the whole model in another project's form.

        Args:
            save_dir: the folder.
            dtype: number format of the weights; as they are when None.
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


def built(value: Any) -> Any:
    return BUILDER.build(value) if isinstance(value, Mapping) else value


def _vision_config(visual_encoder: Any) -> Any:
    config = visual_encoder.config
    return getattr(config, "vision_config", config)


def with_adapter(visual_encoder: Any, lora: Any) -> Any:
    from peft import get_peft_model

    config = built(lora)
    if config.target_modules is None:
        config.target_modules = sorted(
            {
                name.rpartition(".")[2]
                for name, module in visual_encoder.named_modules()
                if isinstance(module, nn.Linear)
            }
        )
    return get_peft_model(visual_encoder, config)
