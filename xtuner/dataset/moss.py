"""MOSS conversations with inner thoughts, commands and the results of tools."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from xtuner.dataset.reading import Row, require_rows
from xtuner.registry import BUILDER
from xtuner.utils.constants import IGNORE_INDEX
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr
from xtuner.utils.types import Tokenizer

TOOL_RESULTS = "Tool Responses"
RESULTS_MARK = "<|Results|>:"
RESULTS_END = "<eor>\n"


class MOSSSFTDataset(Dataset[dict[str, Any]]):
    """Rows of a MOSS file, tokenised.

    The meta instruction and the inside of tool results carry no loss; a turn that would pass
    ``max_length`` ends the sample.

    Args:
        data_file: JSON lines with ``meta_instruction``, ``num_turns`` and ``chat.turn_N``.
        tokenizer: a tokenizer, or the config to build it from.
        max_length: tokens of a sample.
        bot_name: what ``MOSS`` is replaced by; None keeps it.
    """

    def __init__(
        self,
        data_file: str,
        tokenizer: Tokenizer | Mapping[str, Any],
        max_length: int = 2048,
        bot_name: str | None = None,
    ) -> None:
        self.tokenizer = (
            BUILDER.build(dict(tokenizer)) if isinstance(tokenizer, Mapping) else tokenizer
        )
        self.max_length = max_length
        self.bot_name = bot_name
        self.data_file = data_file
        if not Path(data_file).is_file():
            raise UserError(
                tr("there is no file {path}", path=data_file), where=Where(key="data_file")
            )
        self.rows = [self._encode(row) for row in require_rows(data_file)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    @property
    def length(self) -> list[int]:
        """Tokens of each row."""
        return [len(row["input_ids"]) for row in self.rows]

    def _encode(self, source: Row) -> dict[str, Any]:
        row = source.value
        try:
            meta, turns = row["meta_instruction"], int(row["num_turns"])
            chat = [row["chat"][f"turn_{turn}"] for turn in range(1, turns + 1)]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                tr("not a MOSS row: {error!r}", error=error),
                hint="meta_instruction, num_turns, chat.turn_1 ...",
                where=Where(source.file, source.line),
            ) from error
        ids = self._ids(meta)
        labels = [IGNORE_INDEX] * len(ids)
        for turn in chat:
            turn_ids: list[int] = []
            turn_labels: list[int] = []
            for part, text in turn.items():
                part_ids, part_labels = self._part(part, text)
                turn_ids += part_ids
                turn_labels += part_labels
            if len(ids) + len(turn_ids) > self.max_length:
                break
            ids += turn_ids
            labels += turn_labels
        return {"input_ids": ids[: self.max_length], "labels": labels[: self.max_length]}

    def _part(self, name: str, text: str) -> tuple[list[int], list[int]]:
        ids = self._ids(text)
        if name != TOOL_RESULTS:
            return ids, list(ids)
        labels = list(ids)
        first, last = len(self._ids(RESULTS_MARK)), len(self._ids(RESULTS_END))
        labels[first : len(ids) - last] = [IGNORE_INDEX] * max(0, len(ids) - first - last)
        return ids, labels

    def _ids(self, text: str) -> list[int]:
        if self.bot_name is not None:
            text = text.replace("MOSS", self.bot_name)
        return list(self.tokenizer.encode(text, add_special_tokens=False))
