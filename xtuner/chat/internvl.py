"""Chat about an image with InternVL: its tiles, and their places in the first question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from xtuner.chat.prompt import ChatPrompt, Turn
from xtuner.dataset.internvl import MARKS, choose_grid, cut, to_pixels


@dataclass
class InternVLChat:
    """An InternVL that answers about one image; to a chat it looks like a language model.

    Attributes:
        model: an ``InternVLChatModel``.
        context_id: the token whose places image features take.
        pixels: (T, 3, H, W), the tiles of the image; None without one.
    """

    model: Any
    context_id: int
    pixels: Tensor | None = None

    @property
    def config(self) -> Any:
        return self.model.config.llm_config

    @property
    def generation_config(self) -> Any:
        return self.model.language_model.generation_config

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def places(self) -> int:
        """How many tokens the image takes in a prompt."""
        if self.pixels is None:
            return 0
        patch, ratio = (
            self.model.config.vision_config.patch_size,
            self.model.config.downsample_ratio,
        )
        return len(self.pixels) * int((self.pixels.shape[-1] // patch * ratio) ** 2)

    def set_image(self, image: Image) -> None:
        """Talk about this image from now on."""
        config = self.model.config
        size = int(config.force_image_size or config.vision_config.image_size)
        fewest, most = config.min_dynamic_patch, config.max_dynamic_patch
        grid = choose_grid(*image.size, fewest, most, size)
        tiles = cut(image.convert("RGB"), grid, size, config.use_thumbnail)
        self.pixels = to_pixels(tiles).to(self.device, self.dtype)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, **settings: object) -> Tensor:
        """(1, S) → (1, S + T): the question's ids and those of the answer."""
        self.model.img_context_token_id = self.context_id
        seen = self.pixels if bool((input_ids == self.context_id).any()) else None
        answer = self.model.generate(seen, input_ids, **settings)
        return torch.cat([input_ids, answer.to(input_ids.device)], 1)


@dataclass
class InternVLPrompt(ChatPrompt):
    """Prompts whose first question stands under the image.

    Attributes:
        chat: the model, which knows how many tokens its image takes.
    """

    chat: InternVLChat | None = None

    def ids(self, turns: Sequence[Turn], system: str = "") -> list[int]:
        """The ids of a conversation, a context token in each place of the image."""
        places = self.chat.places if self.chat else 0
        if places:
            start, context, end = MARKS
            seen = f"{start}{context * places}{end}\n"
            turns = [replace(turns[0], question=seen + turns[0].question), *turns[1:]]
        return super().ids(turns, system)
