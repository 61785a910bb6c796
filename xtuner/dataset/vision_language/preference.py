"""Pairs of answers about the same images, for DPO, ORPO and reward models of models that see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from xtuner.dataset.map_fns import row_function
from xtuner.dataset.vision_language.dataset import VisionLanguageDataset
from xtuner.dataset.vision_language.pairs import PairSide
from xtuner.utils.constants import IGNORE_INDEX, PREFERENCE_SIDES
from xtuner.utils.dataset_settings import require_settings
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr
from xtuner.utils.types import RowFunction

if TYPE_CHECKING:
    from transformers import ProcessorMixin


class VisionLanguagePreferenceDataset(Dataset[dict[str, Any]]):
    """Pairs of a chosen and a rejected answer to one prompt, with its images.

    A row has a prompt (``prompt``, ``question``, ``messages`` or ``conversations``), two answers
    (``chosen`` and ``rejected``: texts, messages or whole conversations; with ms-swift's
    ``rejected_response`` the last message is the chosen one) and images as rows of
    ``VisionLanguageDataset`` have them. A pair is left out where one of its answers cannot be used
    or is longer than ``max_length``.

    Args:
        dataset: a ``datasets.Dataset`` or ``DatasetDict``, or the config to build it from.
        processor: of transformers, or its config.
        max_length: tokens of a prompt with one answer.
        dataset_map_fn: row → a row of this layout; None where rows have it already.
        pack_to_max_length: False; the collate function joins the pairs of a micro-batch.
        long_samples: ``drop`` pairs with an answer longer than ``max_length``, or ``error``.
        is_reward: for a reward model: each answer ends in ``reward_token_id``, where the reward is
            read.
        reward_token_id: see ``is_reward``.
        **kwargs: ``image_folder``, ``max_pixels``, ``video_frames``, ``video_fps``, ``bad_rows``,
            ``max_dataset_length``, ``val_size``, ``part``, ``seed``, ``split`` and
            ``map_num_proc`` as ``VisionLanguageDataset``.

    Attributes:
        table: the pairs without their images, a ``datasets.Dataset`` with the columns of
            ``VisionLanguageDataset.table`` for each side.

    Raises:
        UserError: as ``VisionLanguageDataset``, and when no pair is left.
    """

    def __init__(
        self,
        dataset: Any,
        processor: ProcessorMixin | Mapping[str, Any],
        max_length: int = 2048,
        dataset_map_fn: RowFunction | str | Mapping[str, Any] | None = None,
        *,
        pack_to_max_length: bool = False,
        long_samples: str = "drop",
        is_reward: bool = False,
        reward_token_id: int = -1,
        **kwargs: Any,
    ) -> None:
        given = {"long_samples": long_samples, "pack_to_max_length": pack_to_max_length, **kwargs}
        given |= {"is_reward": is_reward, "reward_token_id": reward_token_id}
        require_settings("VisionLanguagePreferenceDataset", {"max_length": max_length, **given})
        self.ends = (reward_token_id,) if is_reward else ()
        map_row = row_function(dataset_map_fn)
        self.sides = {
            side: VisionLanguageDataset(
                dataset,
                processor,
                max_length - len(self.ends),
                dataset_map_fn=PairSide(side, map_row),
                pack_to_max_length=False,
                long_samples=long_samples,
                train_on="last_answer",
                **kwargs,
            )
            for side in PREFERENCE_SIDES
        }
        places = [
            {tuple(rows): index for index, rows in enumerate(side.table["rows"])}
            for side in self.sides.values()
        ]
        both = [rows for rows in places[0] if rows in places[1]]
        if not both:
            raise UserError(
                tr(
                    "no pair is left: of each row one of the answers is too long, or cannot be "
                    "used."
                ),
                where=Where(key="train_dataloader.dataset"),
            )
        self.pairs = [tuple(place[rows] for place in places) for rows in both]
        self.table = self._table()

    def _table(self) -> Any:
        from datasets import concatenate_datasets

        tables = []
        for number, (name, side) in enumerate(self.sides.items()):
            table = side.table.select([pair[number] for pair in self.pairs])
            renamed = {column: f"{name}_{column}" for column in table.column_names}
            tables.append(table.rename_columns(renamed))
        return concatenate_datasets(tables, axis=1)

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def length(self) -> list[int]:
        """Tokens of both answers with their prompts, those of placeholders included."""
        columns = (self.table[f"{side}_length"] for side in PREFERENCE_SIDES)
        more = 2 * len(self.ends)
        return [sum(lengths) + more for lengths in zip(*columns, strict=True)]

    @property
    def modality_length(self) -> list[int]:
        """What each pair costs; see ``VisionLanguageDataset``."""
        sides = [side.modality_length for side in self.sides.values()]
        return [sides[0][chosen] + sides[1][rejected] for chosen, rejected in self.pairs]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A pair, its images decoded once.

        Returns:
            ``chosen`` and ``rejected``, each as a row of ``VisionLanguageDataset``.
        """
        chosen_index, rejected_index = self.pairs[index]
        chosen = self.sides["chosen"][chosen_index]
        rejected = self.sides["rejected"].row(rejected_index, chosen["images"])
        if set(chosen["labels"]) == {IGNORE_INDEX}:  # an image could not be read
            rejected["labels"] = [IGNORE_INDEX] * len(rejected["labels"])
        pair = {"chosen": chosen, "rejected": rejected}
        return {name: self._rewarded(name, side) for name, side in pair.items()}

    def _rewarded(self, name: str, side: dict[str, Any]) -> dict[str, Any]:
        """An answer with its reward token, whose label is the side of the pair."""
        if not self.ends:
            return side
        is_trained = set(side["labels"]) != {IGNORE_INDEX}
        label = PREFERENCE_SIDES.index(name) if is_trained else IGNORE_INDEX
        ids = [*side["input_ids"], *self.ends]
        labels = [IGNORE_INDEX] * len(side["labels"]) + [label]
        return {**side, "input_ids": ids, "labels": labels, "length": len(ids)}
