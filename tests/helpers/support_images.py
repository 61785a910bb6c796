"""Training on images: the columns of ``tests.helpers.support`` for the families of ``image_text``.

Rows with one image, with none and with two; all weights are trained, those for images included.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from tests.helpers.image_text import collated, own_loss, samples_of, save_image_text
from xtuner.model.image_text import VisionLanguageFinetune
from xtuner.proving.training import Trained, gradients_of
from xtuner.tokenization.processor import load_processor

WHOLE = {"freeze_visual_encoder": False, "freeze_projector": False}


class ImageText:
    """A tiny vision-language model and its processor.

    Args:
        kind: one of ``image_text.FAMILIES``.
        folder: where they are written.
    """

    def __init__(self, kind: str, folder: Path) -> None:
        self.folder = save_image_text(folder, kind)
        self.processor: Any = load_processor(self.folder)

    @cached_property
    def wanted(self) -> Trained:
        """Each sample alone, by the plain class."""
        settings = {"dtype": torch.float32, "attn_implementation": "eager"}
        plain = AutoModelForImageTextToText.from_pretrained(self.folder, **settings)
        return own_loss(self.processor, plain.eval(), samples_of(self.processor))

    def training(self, *, packed: bool) -> Trained:
        """The samples in one batch, by the product."""
        llm = {
            "type": AutoModelForImageTextToText.from_pretrained,
            "pretrained_model_name_or_path": str(self.folder),
            "dtype": torch.float32,
        }
        model = VisionLanguageFinetune(
            llm,
            processor=self.processor,
            use_varlen_attn=packed,
            use_activation_checkpointing=False,
            **WHOLE,
        ).eval()
        batch = collated(self.processor, samples_of(self.processor), packed=packed)
        loss = model(model.prepare_batch(batch, torch.device("cpu")))["loss"]
        loss.backward()
        return Trained(loss.item(), gradients_of(model.llm))
