"""Multiple-choice questions by subject: the letter that the model finds likeliest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.evaluator import BaseMetric

from xtuner.evaluation.metrics.mmlu_subjects import GROUPS
from xtuner.registry import BUILDER
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr
from xtuner.utils.types import Tokenizer

LETTERS = ("A", "B", "C", "D")


class MMLUMetric(BaseMetric):
    """Share of right answers, of each subject, each group of subjects, and of all questions.

    Rows are ``{input, output, subject}`` (``output`` is the right letter), encoded without their
    output and collated by ``mmlu_collate_fn``.

    Args:
        tokenizer: the tokenizer, or its config.
        *args: of mmengine's ``BaseMetric``.
        **kwargs: likewise; ``prefix`` stands before the names of the results.
    """

    def __init__(self, tokenizer: Tokenizer | Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        tokenizer = BUILDER.build(tokenizer) if isinstance(tokenizer, Mapping) else tokenizer
        self.letter_ids = [
            tokenizer.encode(letter, add_special_tokens=False)[-1] for letter in LETTERS
        ]

    def process(self, data_batch: Mapping[str, Any], data_samples: Sequence[Any]) -> None:
        """Take down the answers of a batch.

        Args:
            data_batch: of ``mmlu_collate_fn``.
            data_samples: ``[{'logits': (B, S, V)}]`` of the model.
        """
        logits = data_samples[0]["logits"]
        asked = data_batch["data_samples"]
        mask = torch.as_tensor(data_batch["data"]["attention_mask"])
        for row in range(len(logits)):
            last = int(mask[row].nonzero()[-1])
            chosen = int(logits[row, last, self.letter_ids].float().argmax())
            self.results.append(
                (str(asked["subjects"][row]), LETTERS[chosen], str(asked["gold"][row]).strip())
            )

    def compute_metrics(self, results: Sequence[tuple[str, str, str]]) -> dict[str, float]:
        """Shares from 0 to 1.

        Args:
            results: (subject, chosen letter, right letter) of each question.

        Returns:
            By subject; by group (the mean of its subjects that were asked); ``average``, the share
            of all questions.
        """
        wrong = sorted({gold for _, _, gold in results if gold not in LETTERS})
        if wrong:
            raise UserError(
                tr("the right answer must be one of A to D, not {wrong}", wrong=", ".join(wrong)),
                where=Where(key="output"),
            )
        by_subject: dict[str, list[bool]] = defaultdict(list)
        for subject, chosen, gold in results:
            by_subject[subject].append(chosen == gold)
        shares = {name: sum(right) / len(right) for name, right in sorted(by_subject.items())}
        for group, subjects in GROUPS.items():
            asked = [shares[name] for name in subjects if name in by_subject]
            if asked:
                shares[group] = sum(asked) / len(asked)
        every = [right for answers in by_subject.values() for right in answers]
        shares["average"] = sum(every) / max(1, len(every))
        return shares
