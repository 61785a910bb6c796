"""A conversation with images as inputs of ``generate``, made by the model's processor.

Serves chat, sample answers while training, and evaluation. Training encodes whole conversations
with their labels; the prompt of an answer is the same there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from transformers import ProcessorMixin


def user_message(question: str, images: int = 0) -> dict[str, Any]:
    """A question as a message with content parts, its images before its text.

    Args:
        question: the text.
        images: how many images it is about.
    """
    parts = [{"type": "image"}] * images
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}


def text_message(role: str, text: str) -> dict[str, Any]:
    """A message of text alone; templates of these models take lists of parts."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


def encode_image_prompt(
    processor: ProcessorMixin,
    messages: list[dict[str, Any]],
    images: Sequence[Image],
    template_arguments: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """The inputs of ``generate`` for a conversation whose last question is to be answered.

    Args:
        processor: of the model.
        messages: with content parts; ``{"type": "image"}`` is the place of an image.
        images: of all messages, in order.
        template_arguments: given to the chat template, such as ``enable_thinking``.

    Returns:
        ``input_ids`` and ``attention_mask`` (1, S), and what the processor makes of the images.
    """
    text = processor.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **(template_arguments or {})
    )
    inputs = processor(
        text=[text],
        images=[list(images)] if images else None,
        add_special_tokens=False,  # the template writes them
        return_tensors="pt",
    )
    return dict(inputs)
