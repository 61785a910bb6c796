"""InternVL 1.5 and 2: its own visual encoder, projector and language model, fine-tuned together."""

from __future__ import annotations

import copy
import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xtuner.model.activation_checkpointing import enable_activation_checkpointing
from xtuner.model.loading import init_from_checkpoint, keep_4bit_layout
from xtuner.model.lora.merge import merged_copy
from xtuner.model.modules import attention
from xtuner.model.vision_language import (
    VisionLanguageModel,
    build,
    with_adapter,
    with_zero_gradient,
)
from xtuner.utils.errors import UserError, Where
from xtuner.utils.files import copy_side_files, write_text, written_aside
from xtuner.utils.lang import tr
from xtuner.utils.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MODEL_TYPE = "internvl_chat"
CONTEXT_TOKEN = "<IMG_CONTEXT>"
"""The token whose places image features take."""


class InternVL_V1_5(VisionLanguageModel):
    """Fine-tunes a model of the InternVL family.

    Args:
        model_path: hub name or folder of the whole model, of ``model_type`` ``internvl_chat``; the
            code that it brings is not run.
        freeze_llm: leave the language model as it is; it may still get an adapter.
        freeze_visual_encoder: likewise.
        llm_lora: adapter of the language model.
        visual_encoder_lora: adapter of the visual encoder.
        quantization_vit: load the visual encoder in 4 bits (with an adapter only).
        quantization_llm: load the language model in 4 bits (with an adapter only).
        pretrained_pth: a checkpoint to start from.
        use_activation_checkpointing: recompute activations in the backward pass instead of storing
            them, see ``Checkpointing``.
        loader: what loads the whole model, in place of ``AutoModel.from_pretrained``.

    Raises:
        UserError: when all weights of a quantised part are to be trained, or ``model_path`` is a
            model of another kind.
    """

    needs_weights = True
    """A converter cannot build it from its config alone; a plan gives it a ``loader``."""

    def __init__(
        self,
        model_path: str,
        freeze_llm: bool = False,
        freeze_visual_encoder: bool = False,
        llm_lora: Any = None,
        visual_encoder_lora: Any = None,
        quantization_vit: bool = False,
        quantization_llm: bool = False,
        pretrained_pth: str | None = None,
        use_activation_checkpointing: bool | Mapping[str, Any] = True,
        loader: Callable[..., Any] | None = None,
    ) -> None:
        _check(quantization_llm, freeze_llm, llm_lora, "llm")
        _check(quantization_vit, freeze_visual_encoder, visual_encoder_lora, "visual_encoder")
        whole, tokenizer = _load(model_path, quantization_vit, quantization_llm, loader)
        super().__init__(
            whole.language_model,
            lora=_targets(llm_lora),
            use_activation_checkpointing=False,
        )
        self.tokenizer = tokenizer
        self.model_path = model_path
        self.freeze_llm, self.freeze_visual_encoder = freeze_llm, freeze_visual_encoder
        self.visual_encoder, self.projector = whole.vision_model, whole.mlp1
        if freeze_llm and llm_lora is None:
            self.llm.requires_grad_(False)
        if freeze_visual_encoder or visual_encoder_lora is not None:
            self.visual_encoder.requires_grad_(False)
        if visual_encoder_lora is not None:
            self.visual_encoder = with_adapter(self.visual_encoder, visual_encoder_lora)
            whole.vision_model = self.visual_encoder
        self.projector.requires_grad_(True)
        object.__setattr__(self, "whole", whole)  # its parts are registered above
        self.context_id = int(tokenizer.convert_tokens_to_ids(CONTEXT_TOKEN))
        whole.img_context_token_id = self.context_id
        self._checkpoint_activations(use_activation_checkpointing)
        if pretrained_pth is not None:
            init_from_checkpoint(self, pretrained_pth)

    def _checkpoint_activations(self, setting: bool | Mapping[str, Any]) -> None:
        parts = [(self.causal_lm, False), (self.visual_encoder, self.freeze_visual_encoder)]
        for part, frozen in parts:
            if not frozen and getattr(part, "supports_gradient_checkpointing", False):
                enable_activation_checkpointing(part, setting)

    def with_images(self, data: Batch) -> Batch:
        """Merge the features of tiles, one for each context token; see ``VisionLanguageModel``."""
        ids, tiles = data["input_ids"], data.get("pixel_values")
        merged: Batch = {**data}
        del merged["input_ids"]
        merged.pop("pixel_values", None)
        if tiles is not None and len(tiles):
            merged["inputs_embeds"] = self.whole.embed(ids, self._features(tiles))
            return merged
        features = self._features(self._blank_tile(ids.device))
        merged["inputs_embeds"] = with_zero_gradient(self.whole.embed(ids, None), features)
        return merged

    def _features(self, tiles: Tensor) -> Tensor:
        """(T, P, H) of (T, 3, H, W)."""
        dtype = next(self.projector.parameters()).dtype
        features: Tensor = self.whole.extract_feature(tiles.to(dtype))
        return features

    def encode_blank(self, side: int) -> tuple[Callable[[], object], int]:
        """See ``VisionLanguageModel``."""
        config = self.whole.config
        grid = image_size(config) // config.vision_config.patch_size
        tile = self._blank_tile(torch.device("cpu"))
        return functools.partial(self._features, tile), int((grid * config.downsample_ratio) ** 2)

    def _blank_tile(self, device: torch.device) -> Tensor:
        size = image_size(self.whole.config)
        return torch.zeros(1, 3, size, size, device=device)

    def to_hf(
        self,
        save_dir: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        safe_serialization: bool = True,
        max_shard_size: int | str = "2GB",
    ) -> None:
        """Write the whole model with adapters merged, and the code that it needs.

        Args:
            save_dir: the folder.
            dtype: of the weights; as they are when None.
            safe_serialization: kept from v0.1; transformers 5 writes safetensors only.
            max_shard_size: of a file.
        """
        whole = copy.copy(self.whole)
        whole._modules = dict(self.whole._modules)
        whole.language_model = merged_copy(self.llm, dtype)
        whole.vision_model = merged_copy(self.visual_encoder, dtype)
        weights = {
            name: (value.to(dtype) if dtype and value.is_floating_point() else value).contiguous()
            for name, value in whole.state_dict().items()
        }
        source = _folder_of(self.model_path)
        with written_aside(save_dir) as aside:
            whole.save_pretrained(aside, state_dict=weights, max_shard_size=max_shard_size)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(aside)
            config = json.loads((source / "config.json").read_text("utf-8"))
            written = str(weights["mlp1.1.weight"].dtype).removeprefix("torch.")
            config |= dict.fromkeys({"torch_dtype", *({"dtype"} & config.keys())}, written)
            write_text(aside / "config.json", json.dumps(config, indent=2) + "\n")
            copy_side_files(source, aside, replace=False)


def image_size(config: PreTrainedConfig) -> int:
    """The side of a tile in pixels, by the config of the whole model."""
    return int(getattr(config, "force_image_size", None) or config.vision_config.image_size)


def _check(quantised: bool, frozen: bool, lora: Any, part: str) -> None:
    if quantised and not frozen and lora is None:
        raise UserError(
            tr("the {part} is quantised and all its weights are to be trained", part=part),
            hint=tr("freeze it (freeze_{part}=True) or give it an adapter.", part=part),
            where=Where(key=f"model.quantization_{'llm' if part == 'llm' else 'vit'}"),
        )


def _targets(lora: object) -> Any:
    return None if lora is None else build(lora)


def _load(
    model_path: str, quantise_vit: bool, quantise_llm: bool, loader: Callable[..., Any] | None
) -> tuple[Any, Any]:
    """The whole model and its tokenizer."""
    from transformers import BitsAndBytesConfig, PreTrainedConfig

    from xtuner.model.remote_code import IN_CONFIG, load_pretrained
    from xtuner.model.transformers_models.auto import AutoModel, AutoTokenizer

    config, _ = PreTrainedConfig.get_config_dict(model_path)
    if config.get("model_type") != MODEL_TYPE:
        raise UserError(
            tr(
                "this is a {found}, no InternVL model of type {wanted}",
                found=config.get("model_type"),
                wanted=MODEL_TYPE,
            ),
            hint=tr("give an InternVL 1.5 or 2 such as OpenGVLab/InternVL2-2B."),
            where=Where(model_path, key="model.model_path"),
        )
    settings: dict[str, Any] = {"dtype": torch.bfloat16, "trust_remote_code": False}
    settings["attn_implementation"] = attention.register()
    if quantise_vit or quantise_llm:
        kept = ["mlp1", "lm_head", "output"]
        kept += [] if quantise_vit else ["vision_model"]
        kept += [] if quantise_llm else ["language_model"]
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            llm_int8_skip_modules=kept,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    whole: Any = (loader or AutoModel.from_pretrained)(model_path, **settings)
    keep_4bit_layout(whole)
    tokenizer = load_pretrained(AutoTokenizer, model_path, trusted=False, consent=IN_CONFIG)
    return whole, tokenizer


def _folder_of(model_path: str) -> Path:
    """A local folder itself, or where transformers keeps the files of a hub model."""
    from transformers.utils import cached_file

    return Path(str(cached_file(model_path, "config.json"))).parent
