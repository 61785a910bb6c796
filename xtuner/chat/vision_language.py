"""Chat about an image: LLaVA models assembled from their parts, and prompts with an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xtuner.chat.prompt import ChatPrompt, Turn
from xtuner.tokenization.segments import encode_segments, split_images
from xtuner.utils.constants import DEFAULT_IMAGE_TOKEN
from xtuner.utils.errors import UserError, Where
from xtuner.utils.hub import ModelUnavailableError
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

    from xtuner.model.llava import LLaVAModel
    from xtuner.utils.types import ImageProcessor


@dataclass
class VisionLanguageModel:
    """A LLaVA model with one image, with the interface of a language model that ``chat`` uses.

    Attributes:
        llava: the model.
        image_processor: of its visual encoder.
        pixels: (1, 3, H, W), the current image; None without one.
    """

    llava: LLaVAModel
    image_processor: ImageProcessor
    pixels: Tensor | None = None

    @property
    def config(self) -> PreTrainedConfig:
        config: PreTrainedConfig = self.llava.llm.config
        return config

    @property
    def generation_config(self) -> GenerationConfig:
        config: GenerationConfig = self.llava.llm.generation_config
        return config

    @property
    def device(self) -> torch.device:
        device: torch.device = self.llava.llm.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.llava.llm.dtype
        return dtype

    def set_image(self, image: Image) -> None:
        """Set the image of the conversation."""
        from xtuner.dataset.images import pixel_values

        self.pixels = pixel_values(image, self.image_processor, square=True)[None]

    @torch.no_grad()
    def generate(self, input_ids: Tensor, **settings: object) -> Tensor:
        """Generate T tokens: (1, S) -> (1, S + T), the prompt followed by the answer."""
        pixels = self.pixels if self.pixels is not None and (input_ids < 0).any() else None
        if pixels is not None:
            pixels = pixels.to(self.device)
        answer = self.llava.generate(input_ids, pixel_values=pixels, **settings)
        return torch.cat([input_ids, answer.to(input_ids.device)], 1)


@dataclass
class ImagePrompt(ChatPrompt):
    """Prompts with the image before the first question."""

    def ids(self, turns: Sequence[Turn], system: str = "") -> list[int]:
        """The ids of a conversation, with ``IMAGE_TOKEN_INDEX`` in the place of the image."""
        turns = [  # one mark, as one image is there, whatever was typed
            replace(turn, question=turn.question.replace(DEFAULT_IMAGE_TOKEN, "").strip())
            for turn in turns
        ]
        first = replace(turns[0], question=f"{DEFAULT_IMAGE_TOKEN}\n{turns[0].question}")
        if self.template is None:
            raise UserError(
                tr("a chat about images needs a template"),
                hint="--prompt-template vicuna",
            )
        segments = [
            part
            for segment in self.segments([first, *turns[1:]], system)
            for part in (split_images(segment) or [segment])
        ]
        encoded = encode_segments(self.tokenizer, segments, with_image_token=True)
        return [token for segment in encoded for token in segment]


def build_vision_language_model(
    llm: PreTrainedModel,
    llava: Path,
    visual_encoder: str | None,
    visual_select_layer: int,
    *,
    trust_remote_code: bool = False,
) -> VisionLanguageModel:
    """Assemble a LLaVA model from the parts that ``convert pth_to_hf`` wrote.

    Args:
        llm: the language model, with its adapter if there is one.
        llava: the folder with ``projector/`` and, where trained, ``visual_encoder/`` or
            ``visual_encoder_adapter/``.
        visual_encoder: folder or hub name; None for the one in ``llava``.
        visual_select_layer: index of the hidden states that the projector reads.
        trust_remote_code: whether code of the folders may run.

    Raises:
        UserError: when a part is missing.
    """
    from transformers import AutoImageProcessor

    from xtuner.model.llava import LLaVAModel
    from xtuner.model.modules.projector import ProjectorModel
    from xtuner.model.remote_code import load_pretrained

    own = llava / "visual_encoder"
    place = str(own) if own.is_dir() else visual_encoder
    if place is None:
        raise UserError(
            tr("there is no visual encoder"),
            hint="--visual-encoder openai/clip-vit-large-patch14-336",
            where=Where(str(llava)),
        )
    encoder = _visual_encoder(place, llm.dtype, trust_remote_code)
    if (llava / "visual_encoder_adapter").is_dir():
        from xtuner.model.lora.adapter_files import load_adapter

        encoder = load_adapter(encoder, llava / "visual_encoder_adapter", partial=True)
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
        processor = load_pretrained(
            AutoImageProcessor, visual_encoder or place, trusted=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(
            tr("there is no image processor"),
            hint=tr("pass the visual encoder of the training config with --visual-encoder."),
            where=Where(visual_encoder or place),
        ) from error
    return VisionLanguageModel(model.eval(), processor)


def _visual_encoder(place: str, dtype: torch.dtype, trusted: bool) -> Any:
    """Load the visual part of a model by the class of its config (CLIPVisionModel, ...)."""
    from transformers import MODEL_MAPPING

    from xtuner.model.remote_code import load_pretrained
    from xtuner.model.transformers_models.auto import AutoConfig

    try:
        config = load_pretrained(AutoConfig, place, trusted=trusted)
        loader: Any = MODEL_MAPPING[type(getattr(config, "vision_config", config))]
        return loader.from_pretrained(place, dtype=dtype)
    except (ModelUnavailableError, OSError, ValueError, KeyError) as error:
        why = error.message if isinstance(error, UserError) else error
        raise UserError(
            tr("the visual encoder cannot be loaded: {error}", error=why),
            hint="--visual-encoder openai/clip-vit-large-patch14-336",
            where=Where(place),
        ) from error
