"""Logs, before the training, one sample of the data as text: what is read and what is learnt."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from xtuner.registry import BUILDER
from xtuner.utils.constants import IGNORE_INDEX
from xtuner.utils.lang import tr
from xtuner.utils.terminal import printable

if TYPE_CHECKING:
    from xtuner.engine.runner.finetune_runner import FinetuneRunner
    from xtuner.engine.sharded_batches import SizedRows
    from xtuner.utils.types import Tokenizer


@HOOKS.register_module()
class DatasetInfoHook(Hook):
    """Logs the number of rows and the first sample of each split, decoded.

    What is learnt stands between ``[[`` and ``]]``.

    Args:
        tokenizer: the tokenizer, or its config.
        is_intern_repo_dataset: the labels of such data lie one place to the left of their tokens,
            and tokens that are not learnt are negative in ``input_ids``.
    """

    def __init__(
        self, tokenizer: Tokenizer | Mapping[str, Any], is_intern_repo_dataset: bool = False
    ) -> None:
        self.tokenizer = BUILDER.build(tokenizer) if isinstance(tokenizer, Mapping) else tokenizer
        self.is_intern_repo_dataset = is_intern_repo_dataset

    @master_only
    def before_train(self, runner: FinetuneRunner) -> None:
        """Log the training data."""
        self._log(runner, runner.train_dataloader.dataset, "train")

    @master_only
    def before_val(self, runner: FinetuneRunner) -> None:
        """Log the validation data."""
        self._log(runner, runner.val_dataloader.dataset, "val")

    @master_only
    def before_test(self, runner: FinetuneRunner) -> None:
        """Log the test data."""
        self._log(runner, runner.test_dataloader.dataset, "test")

    def _log(self, runner: FinetuneRunner, dataset: SizedRows, split: str) -> None:
        text = tr(
            "{split}: {rows} rows after preparation. The first:", split=split, rows=len(dataset)
        )
        runner.logger.info(text)
        sample = dataset[0]
        for name in ("input_ids", "chosen_ids", "rejected_ids"):
            if name in sample:
                labels = sample.get(name.replace("input_ids", "labels").replace("_ids", "_labels"))
                text = self.decode_with_mask(
                    list(sample[name]), list(labels) if labels is not None else []
                )
                runner.logger.info(printable(text))

    def decode_with_mask(self, ids: Sequence[int], labels: Sequence[int]) -> str:
        """Decode a sample, what is learnt between ``[[`` and ``]]``."""
        if self.is_intern_repo_dataset:
            return self.tokenizer.decode([abs(int(token)) for token in ids])
        if len(labels) != len(ids):
            return self._decode(ids)
        segments = []
        for learnt, pairs in itertools.groupby(
            zip(ids, labels, strict=True), lambda pair: int(pair[1]) != IGNORE_INDEX
        ):
            text = self._decode([token for token, _ in pairs])
            segments.append(f"[[{text}]]" if learnt else text)
        return "".join(segments)

    def _decode(self, ids: Sequence[int]) -> str:
        """Decode; a negative id stands for an image or the like."""
        segments: list[str] = []
        for special, tokens in itertools.groupby(ids, lambda token: int(token) < 0):
            group = [int(token) for token in tokens]
            segments += (
                [f"<{-token}>" for token in group] if special else [self.tokenizer.decode(group)]
            )
        return "".join(segments)
