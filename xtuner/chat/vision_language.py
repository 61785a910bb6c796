"""Chat about an image: the parts of a LLaVA model put together, prompts with the image in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xtuner.chat.prompt import ChatPrompt, Turn
from xtuner.tokenization.segments import encode_segments, split_images
from xtuner.utils.constants import DEFAULT_IMAGE_TOKEN
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr


@dataclass
class VisionLanguageModel:
    """A LLaVA model that answers about one image; to a chat it looks like a language model.

    Attributes:
        llava: the model.
        image_processor: of its visual encoder.
        pixels: (1, 3, H, W) of the image that is talked about.
    """

    llava: Any
    image_processor: Any
    pixels: Tensor | None = None

    @property
    def config(self) -> Any:
        return self.llava.llm.config

    @property
    def generation_config(self) -> Any:
        return self.llava.llm.generation_config

    @property
    def device(self) -> torch.device:
        device: torch.device = self.llava.llm.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.llava.llm.dtype
        return dtype

    def set_image(self, image: Any) -> None:
        """Talk about this image (of Pillow) from now on."""
        from xtuner.dataset.images import pixel_values

        self.pixels = pixel_values(image, self.image_processor, square=True)[None]

    @torch.no_grad()
    def generate(self, input_ids: Tensor, **settings: Any) -> Tensor:
        """(1, S) → (1, S + T): the question's ids and those of the answer."""
        pixels = self.pixels if self.pixels is not None and (input_ids < 0).any() else None
        if pixels is not None:
            pixels = pixels.to(self.device)
        answer = self.llava.generate(input_ids, pixel_values=pixels, **settings)
        return torch.cat([input_ids, answer.to(input_ids.device)], 1)


@dataclass
class ImagePrompt(ChatPrompt):
    """Prompts whose first question stands under the image."""

    def ids(self, turns: Sequence[Turn], system: str = "") -> list[int]:
        """The ids of a conversation about the image, its place as ``IMAGE_TOKEN_INDEX``."""
        first = replace(turns[0], question=f"{DEFAULT_IMAGE_TOKEN}\n{turns[0].question}")
        if self.template is None:
            raise UserError(
                tr("a chat about images needs a template"),
                hint="--prompt-template vicuna",
            )
        segments = [
            part
            for piece in self.segments([first, *turns[1:]], system)
            for part in (split_images(piece) or [piece])
        ]
        encoded = encode_segments(self.tokenizer, segments, with_image_token=True)
        return [token for piece in encoded for token in piece]


def build_vision_language_model(
    llm: Any, llava: Path, visual_encoder: str | None, visual_select_layer: int
) -> VisionLanguageModel:
    """The parts that ``convert pth_to_hf`` wrote, on a language model.

    Args:
        llm: the language model, its adapter on.
        llava: the folder with ``projector/`` and, where trained, ``visual_encoder/`` or
            ``visual_encoder_adapter/``.
        visual_encoder: folder or hub name; None takes the one of ``llava``.
        visual_select_layer: which hidden states are taken.

    Raises:
        UserError: when a part is missing.
    """
    from transformers import AutoImageProcessor

    from xtuner.model.llava import LLaVAModel
    from xtuner.model.modules.projector import ProjectorModel

    own = llava / "visual_encoder"
    place = str(own) if own.is_dir() else visual_encoder
    if place is None:
        raise UserError(
            tr("there is no visual encoder"),
            hint="--visual-encoder openai/clip-vit-large-patch14-336",
            where=Where(str(llava)),
        )
    encoder = _visual_encoder(place, llm.dtype)
    if (llava / "visual_encoder_adapter").is_dir():
        from peft import PeftModel

        encoder = PeftModel.from_pretrained(encoder, str(llava / "visual_encoder_adapter"))
    model = LLaVAModel(
        llm=llm,
        visual_encoder=encoder,
        freeze_llm=True,
        freeze_visual_encoder=not own.is_dir(),
        visual_select_layer=visual_select_layer,
        use_activation_checkpointing=False,
    )
    model.projector = ProjectorModel.from_pretrained(llava / "projector", dtype=llm.dtype)
    model.visual_encoder.to(llm.device)
    model.projector.to(llm.device)
    model.llm.config.use_cache = True
    try:
        processor = AutoImageProcessor.from_pretrained(visual_encoder or place)
    except (OSError, ValueError) as error:
        raise UserError(
            tr("there is no image processor"),
            hint=tr("--visual-encoder with the visual encoder that training began with."),
            where=Where(visual_encoder or place),
        ) from error
    return VisionLanguageModel(model.eval(), processor)


def _visual_encoder(place: str, dtype: torch.dtype) -> Any:
    """The visual half of a model, by the class that configs name (CLIPVisionModel, ...)."""
    from transformers import MODEL_MAPPING

    from xtuner.model.transformers_models.auto import AutoConfig

    try:
        config = AutoConfig.from_pretrained(place)
        loader: Any = MODEL_MAPPING[type(getattr(config, "vision_config", config))]
        return loader.from_pretrained(place, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            tr("the visual encoder cannot be loaded: {error}", error=error),
            hint="--visual-encoder openai/clip-vit-large-patch14-336",
            where=Where(place),
        ) from error
