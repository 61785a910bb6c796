"""LLaVA models in Hugging Face's and the official layout: what they need besides the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner.registry import BUILDER
from xtuner.utils.constants import DEFAULT_IMAGE_TOKEN
from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from mmengine import Config
    from torch import Tensor

    from xtuner.model.llava import LLaVAModel
    from xtuner.utils.types import ImageProcessor, Tokenizer


def require_llava(model: Mapping[str, Any], save_format: str) -> None:
    """Check that a model can be saved in a LLaVA layout.

    Args:
        model: the config's ``model`` section.
        save_format: the value of ``--save-format``.

    Raises:
        UserError: when the model is not a LLaVA model.
    """
    if not hasattr(model["type"], "save_formats"):
        name = getattr(model["type"], "__name__", model["type"])
        raise UserError(
            tr(
                "--save-format {save_format} is for LLaVA models; this is {name}.",
                save_format=save_format,
                name=name,
            ),
            hint=tr("omit --save-format."),
        )


def complete_parts(model: LLaVAModel, section: Mapping[str, Any]) -> None:
    """Give the parts that are written as a whole the values that training leaves alone.

    A checkpoint has what was trained: not the encoder's layers behind the selected one, and one of
    two tied weights.

    Args:
        model: without values, but for those of the checkpoint; changed in place.
        section: the config's ``model`` section.
    """
    whole = {
        "llm": not (model.has_adapter or model.freeze_llm),
        "visual_encoder": not (
            hasattr(model.visual_encoder, "peft_config") or model.freeze_visual_encoder
        ),
    }
    for name in (name for name, written in whole.items() if written):
        part: Any = getattr(model, name)
        part.tie_weights()
        state = part.state_dict()
        absent = [key for key, value in state.items() if value.is_meta]
        if absent:
            base: dict[str, Tensor] = BUILDER.build(section[name]).state_dict()
            dtypes = {value.dtype for value in state.values() if not value.is_meta}
            dtype = next(iter(dtypes)) if len(dtypes) == 1 else None
            values = {key: base[key].to(dtype or base[key].dtype) for key in absent}
            part.load_state_dict(values, strict=False, assign=True)


def write_processor(cfg: Config, tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer and image processor of Hugging Face's layout, with training's settings.

    Args:
        cfg: the training config; its ``image_processor`` and the dataset's ``pad_image_to_square``
            are read.
        tokenizer: ``<image>`` is added to it.
        folder: with the model's ``config.json``.
    """
    section = cfg.get("image_processor")
    if section is None:
        print(tr("the config has no image_processor: none is written"))
    image_processor = None if section is None else BUILDER.build(section)
    dataset = (cfg.get("train_dataloader") or {}).get("dataset") or {}
    parts = dataset.get("datasets") or [dataset]
    square = any(part.get("pad_image_to_square", False) for part in parts)
    save_with_image_token(image_processor, tokenizer, folder, square=square)


def save_with_image_token(
    image_processor: ImageProcessor | None, tokenizer: Tokenizer, folder: Path, *, square: bool
) -> None:
    """Write tokenizer and image processor of Hugging Face's layout.

    Args:
        image_processor: of the visual encoder, if it is known.
        tokenizer: ``<image>`` is added where it is missing.
        folder: with the model's ``config.json``.
        square: images are padded to squares.
    """
    from transformers import LlavaConfig

    from xtuner.model.modules.llava_formats import save_processor

    tokenizer.add_tokens([DEFAULT_IMAGE_TOKEN], special_tokens=True)
    tokenizer.save_pretrained(folder)
    if image_processor is None:
        return
    config: Any = LlavaConfig.from_pretrained(folder)
    save_processor(image_processor, tokenizer, config, folder, square=square)
