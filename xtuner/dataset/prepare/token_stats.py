"""What became of every row and token of a dataset: trained, truncated, or dropped, and why."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from xtuner.utils.lang import N_, tr, translate

if TYPE_CHECKING:
    from datasets import Dataset

FIRST_ROWS = 5
KEY = "xtuner_account"
"""The key of the counts in a prepared dataset's description."""
_SAVED_NAMES = {"tokens_truncated": "tokens_cut", "rows_truncated": "rows_cut"}
"""Fields that have other names there and in ``account.json``."""

REASONS = {
    "empty": N_("rows without a conversation"),
    "no_label": N_("rows without a supervised token"),
    "too_long": N_("rows longer than max_length"),
    "bad": N_("rows that cannot be used"),
    "unreadable": N_("lines that cannot be read"),
}


@dataclass
class TokenStats:
    """Tokens in = trained + cut + dropped; rows in = trained + dropped.

    Attributes:
        rows_in: rows read.
        rows_trained: rows that reach training.
        tokens_in: tokens of all encoded rows.
        tokens_trained: tokens that reach training (with and without a label).
        tokens_supervised: those with a label.
        tokens_truncated: tokens beyond ``max_length``.
        tokens_dropped: tokens of rows that were dropped.
        rows_truncated: numbers of the rows that were truncated.
        dropped: for each reason the numbers of the rows that were dropped.
        bad_rows: what is wrong with the first of those that cannot be used, with file and line.
    """

    rows_in: int = 0
    rows_trained: int = 0
    tokens_in: int = 0
    tokens_trained: int = 0
    tokens_supervised: int = 0
    tokens_truncated: int = 0
    tokens_dropped: int = 0
    rows_truncated: list[int] = field(default_factory=list)
    dropped: dict[str, list[int]] = field(default_factory=dict)
    bad_rows: list[str] = field(default_factory=list)

    def add(self, other: TokenStats) -> None:
        """Add the counts of more rows."""
        for name, value in asdict(other).items():
            if name != "dropped":
                setattr(self, name, getattr(self, name) + value)
        for reason, rows in other.dropped.items():
            self.dropped.setdefault(reason, []).extend(rows)
        self.bad_rows = self.bad_rows[:FIRST_ROWS]

    def text(self) -> str:
        """The counts for people, in their language."""
        lines = [
            tr(
                "rows: {rows_in:,} in, {rows_trained:,} trained",
                rows_in=self.rows_in,
                rows_trained=self.rows_trained,
            ),
            tr(
                "tokens: {tokens_in:,} in, {tokens_trained:,} trained "
                "({tokens_supervised:,} with loss), {tokens_cut:,} cut",
                tokens_in=self.tokens_in,
                tokens_trained=self.tokens_trained,
                tokens_supervised=self.tokens_supervised,
                tokens_cut=self.tokens_truncated,
            ),
        ]
        return "\n".join([*lines, *self.losses()])

    def losses(self) -> list[str]:
        """What does not reach training, a line for each reason."""
        lines = []
        if self.rows_truncated:
            lines.append(tr("cut at max_length: {rows}", rows=_named(self.rows_truncated)))
        for reason, rows in self.dropped.items():
            if rows:
                why = translate(REASONS[reason])
                lines.append(tr("dropped, {why}: {rows}", why=why, rows=_named(rows)))
        return lines + [f"  {each}" for each in self.bad_rows]

    def to_dict(self) -> dict[str, Any]:
        """The counts as plain data, by the names that files have."""
        return {_SAVED_NAMES.get(name, name): value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> TokenStats:
        """The counts from what ``to_dict`` gave."""
        names = {field.name: _SAVED_NAMES.get(field.name, field.name) for field in fields(cls)}
        return cls(**{name: saved[key] for name, key in names.items() if key in saved})


def _named(rows: list[int]) -> str:
    first = ", ".join(str(row) for row in rows[:FIRST_ROWS])
    more = ", ..." if len(rows) > FIRST_ROWS else ""
    return tr("{count:,} (rows {first}{more})", count=len(rows), first=first, more=more)


def token_stats_of(dataset: object) -> TokenStats | None:
    """The counts of a dataset that ``process_hf_dataset`` made; None for any other.

    Args:
        dataset: a ``datasets.Dataset``.
    """
    description = getattr(getattr(dataset, "info", None), "description", "") or ""
    try:
        found = json.loads(description)
    except ValueError:
        return None
    if not isinstance(found, Mapping) or KEY not in found:
        return None
    return TokenStats.from_dict(found[KEY])


def all_token_stats(dataset: object) -> list[TokenStats]:
    """The counts of a dataset, or of those that are joined in it.

    Args:
        dataset: a ``datasets.Dataset``, one that holds it in ``.table``, or one with its parts in
            ``.datasets``.
    """
    parts = getattr(dataset, "datasets", None) or [dataset]
    found = [token_stats_of(getattr(part, "table", part)) for part in parts]
    return [stats for stats in found if stats is not None]


def attach(dataset: Dataset, stats: TokenStats) -> None:
    """Keep the counts with the dataset, through saving and loading."""
    dataset.info.description = json.dumps({KEY: stats.to_dict()})
