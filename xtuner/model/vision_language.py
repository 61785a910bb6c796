"""What vision-language models share: images are merged before the language model is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from xtuner.model.base import trained_weights
from xtuner.model.sft import SupervisedFinetune
from xtuner.registry import BUILDER
from xtuner.utils.types import Batch

if TYPE_CHECKING:
    from transformers.utils.generic import ModelOutput


class VisionLanguageModel(SupervisedFinetune):
    """A language model with a visual encoder and a projector before it."""

    visual_encoder: Any
    projector: Any
    lengthens_rows = False
    """Whether an image takes more tokens in the model than it has in a row of the dataset."""

    def with_images(self, data: Batch) -> Batch:
        """Put the features of images in place of their tokens.

        Args:
            data: a batch with ``pixel_values`` (N, 3, H, W), the images of all its rows in order;
                none in a batch of text.

        Returns:
            The batch with ``inputs_embeds`` in place of ``input_ids`` and ``pixel_values``.
        """
        raise NotImplementedError

    def encode_blank(self, side: int) -> tuple[Callable[[], object], int]:
        """A call that computes a blank image's features, and to how many tokens it comes.

        Args:
            side: unused: these encoders take images of one size.
        """
        raise NotImplementedError

    def prepare_batch(self, data: Batch, device: torch.device) -> Batch:
        """Leave the batch as it is: images change where tokens are."""
        return data

    def compute_loss(self, data: Batch, num_items_in_batch: Mapping[str, int]) -> dict[str, Tensor]:
        """As ``SupervisedFinetune``, images included."""
        return super().compute_loss(self.with_images(data), num_items_in_batch)

    def compute_outputs(self, data: Batch) -> ModelOutput | Tensor:
        """As ``SupervisedFinetune``, images included."""
        return super().compute_outputs(self.with_images(data))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The weights that are trained."""
        state = nn.Module.state_dict(self, *args, **kwargs)
        return trained_weights(self, state, prefix=str(kwargs.get("prefix", "")))


def with_zero_gradient(embeddings: Tensor, features: Tensor) -> Tensor:
    """Embeddings of a batch of text that depend on features of a blank image, without effect.

    All trained weights then have a gradient, if of zeros, and other processes that wait for it go
    on.
    """
    return embeddings + features.sum() * 0.0


def build(value: object) -> Any:
    """Build a part from its config; a part that is built already is returned."""
    return BUILDER.build(value) if isinstance(value, Mapping) else value


def with_adapter(visual_encoder: Any, lora: Any) -> Any:
    """Put an adapter on a visual encoder; on all its linear layers if ``lora`` names none."""
    from peft import get_peft_model

    config = build(lora)
    if config.target_modules is None:
        config.target_modules = sorted(
            {
                name.rpartition(".")[2]
                for name, module in visual_encoder.named_modules()
                if isinstance(module, nn.Linear)
            }
        )
    return get_peft_model(visual_encoder, config)
