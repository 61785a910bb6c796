"""Stopping generation at a stop word, also at one of several tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import StoppingCriteria

if TYPE_CHECKING:
    from xtuner.utils.types import Tokenizer


class StopWordStoppingCriteria(StoppingCriteria):
    """Stops a sequence once its text ends with ``stop_word``.

    Args:
        tokenizer: decodes the ids.
        stop_word: the text; line breaks in the decoded text are ignored, as published.
    """

    def __init__(self, tokenizer: Tokenizer, stop_word: str) -> None:
        self.tokenizer = tokenizer
        self.stop_word = stop_word
        # A token gives at least one byte, so the last ids hold the whole word.
        self.length = len(stop_word.encode()) + 2

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: object
    ) -> torch.BoolTensor:
        """Which of the sequences ``input_ids (batch, tokens)`` are done: ``(batch,)``."""
        texts = self.tokenizer.batch_decode(input_ids[:, -self.length :])
        done = [
            text.replace("\r", "").replace("\n", "").endswith(self.stop_word.strip("\r\n"))
            for text in texts
        ]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)  # type: ignore[return-value]
