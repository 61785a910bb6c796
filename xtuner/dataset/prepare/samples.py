"""From rows to samples: mapped, with their template, tokenised, and cut where they are too long."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from xtuner.dataset.map_fns.auto import auto_map_fn
from xtuner.dataset.map_fns.dataset_map_fns.dialogue import openai_map_fn
from xtuner.dataset.prepare.parallel_map import ordered_map, usable_processes, with_progress
from xtuner.dataset.prepare.token_stats import FIRST_ROWS, TokenStats
from xtuner.dataset.sources import loader_hint
from xtuner.tokenization.content import is_on, question_of, text_value
from xtuner.tokenization.encode import Sample, encode_conversations
from xtuner.tokenization.messages import encode_messages, messages_of
from xtuner.tokenization.segments import ID_BYTES, SegmentEncoder, Tokens, pack_ids, unpack_ids
from xtuner.tokenization.thinking import reasoning_field, turn_for
from xtuner.utils.constants import IGNORE_INDEX
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr
from xtuner.utils.templates import AUTO_TEMPLATE
from xtuner.utils.types import RowFunction

if TYPE_CHECKING:
    from datasets import Dataset

Row = Mapping[str, Any]

CHUNK, BYTES_A_CHUNK = 4000, 2**21
"""Rows that are tokenised together at most, and about how many bytes; never fewer than 100 rows."""
ROWS_A_PROCESS = 4000
"""Fewer are not worth a process of their own."""


@dataclass(frozen=True)
class Steps:
    """What is done with each row.

    Attributes:
        map_row: the row to a conversation; None where it is one.
        add_template: puts the template around the turns.
        renames: column names, old to new, after mapping.
        tokenizer: of transformers.
        max_length: tokens of a sample at most; None for no limit.
        long_samples: what becomes of longer ones: ``cut``, ``split``, ``drop`` or ``error``.
        train_on: ``answers``, ``last_answer`` or ``everything``.
        with_output: False leaves the answers out.
        with_image_token: ``<image>`` stands for an image.
        bad_rows: rows that cannot be used: ``error`` or ``drop``.
        thinking: of ``dataset_settings.TRAIN_THINKING``.
        place: where the row with a number is, None where that is not known.
    """

    map_row: RowFunction | None
    add_template: RowFunction | None
    renames: Mapping[str, str]
    tokenizer: Any
    max_length: int | None = None
    long_samples: str = "cut"
    train_on: str = "answers"
    with_output: bool = True
    with_image_token: bool = False
    bad_rows: str = "error"
    thinking: str = "keep"
    place: Callable[[int], Where | None] = lambda number: None

    def unlimited(self) -> Steps:
        """The same for samples of any length, with the rows that cannot be used left out."""
        return replace(self, max_length=None, long_samples="cut", bad_rows="drop")

    def named(self, number: int) -> str:
        """A row by its file and line, else by its number."""
        return str(self.place(number) or tr("row {number}", number=number))


class RowError(UserError):
    """A row that cannot be used; ``message`` does not name it."""


@dataclass
class Samples:
    """Samples as flat arrays.

    Attributes:
        input_ids: (tokens,) of all samples, one after the other.
        labels: (tokens,) ``IGNORE_INDEX`` where there is no loss.
        lengths: (samples,) tokens of each.
        rows: (samples,) the number of the row that each is of.
        stats: what became of rows and tokens.
    """

    input_ids: Tokens
    labels: Tokens
    lengths: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    stats: TokenStats = field(default_factory=TokenStats)

    @classmethod
    def of(
        cls, encoded: Mapping[int, Sequence[Mapping[str, Sequence[int]]]], stats: TokenStats
    ) -> Samples:
        """Make the arrays of samples that are lists, given by the number of their row."""
        rows = [(number, sample) for number, samples in encoded.items() for sample in samples]
        ids = [pack_ids(sample["input_ids"]) for _, sample in rows]
        return cls(
            unpack_ids(b"".join(ids)),
            unpack_ids(b"".join(pack_ids(sample["labels"]) for _, sample in rows)),
            np.array([len(each) // ID_BYTES for each in ids], dtype=np.int64),
            np.array([number for number, _ in rows], dtype=np.int64),
            stats,
        )

    @classmethod
    def joined(cls, parts: Iterable[Samples]) -> Samples:
        """Several, in order, as one; none is held after the next one came."""
        stats = TokenStats()
        ids, labels, lengths, rows = (bytearray() for _ in range(4))
        for part in parts:
            stats.add(part.stats)
            ids += part.input_ids.data
            labels += part.labels.data
            lengths += part.lengths.data
            rows += part.rows.data
        return cls(
            np.frombuffer(ids, np.int32),
            np.frombuffer(labels, np.int32),
            np.frombuffer(lengths, np.int64),
            np.frombuffer(rows, np.int64),
            stats,
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def supervised(self) -> npt.NDArray[np.int64]:
        """(samples,) How many tokens of each have a label."""
        counts = np.zeros(len(self), dtype=np.int64)
        has_tokens = self.lengths > 0
        starts = (np.cumsum(self.lengths) - self.lengths)[has_tokens]
        if len(starts):
            is_trained = self.labels != IGNORE_INDEX
            counts[has_tokens] = np.add.reduceat(is_trained, starts, dtype=np.int64)
        return counts

    def picked(self, order: npt.NDArray[np.int64]) -> Samples:
        """The samples in another order."""
        bounds = np.cumsum(self.lengths)[:-1]
        ids, labels = np.split(self.input_ids, bounds), np.split(self.labels, bounds)
        return replace(
            self,
            input_ids=np.concatenate([ids[number] for number in order]),
            labels=np.concatenate([labels[number] for number in order]),
            lengths=self.lengths[order],
            rows=self.rows[order],
        )

    def chosen(self, keep: npt.NDArray[np.bool_]) -> Samples:
        """The samples for which ``keep`` is true."""
        tokens = np.repeat(keep, self.lengths)
        return Samples(
            self.input_ids[tokens],
            self.labels[tokens],
            self.lengths[keep],
            self.rows[keep],
            self.stats,
        )


def encode_rows(rows: Dataset, numbers: Sequence[int], steps: Steps, processes: int) -> Samples:
    """Encode all rows, in several processes where that pays; the result does not depend on them.

    Args:
        rows: a ``datasets.Dataset``.
        numbers: of the rows in their source.
        steps: what is done with each.
        processes: at most.

    Raises:
        UserError: with ``bad_rows='error'`` for rows that cannot be read, mapped or encoded, naming
            them; when no row can be.
    """
    table = rows.data
    chunk = min(CHUNK, max(100, BYTES_A_CHUNK * table.num_rows // max(1, table.nbytes)))
    starts = range(0, len(rows), chunk)
    encoder = SegmentEncoder(steps.tokenizer, steps.with_image_token)

    def work(number: int) -> Samples:
        chosen = slice(starts[number], starts[number] + chunk)
        return _encoded(_row_dicts(rows[chosen]), numbers[chosen], steps, encoder)

    sizes = [min(chunk, len(rows) - start) for start in starts]
    processes = min(usable_processes(processes), max(1, len(rows) // ROWS_A_PROCESS))
    results = ordered_map(work, len(starts), processes)
    what = tr("preparing data")
    return Samples.joined(with_progress(results, sizes, what))


def fit_encoded(samples: Samples, steps: Steps) -> Samples | None:
    """Samples that were encoded with ``steps.unlimited()`` as ``encode_rows`` gives them.

    Returns:
        None where that cannot be told from them: rows were left out.
    """
    dropped, limit = samples.stats.dropped, steps.max_length
    is_cut = limit is not None and bool((samples.lengths > limit).any())
    if dropped.get("bad") or (is_cut and dropped.get("no_label")):
        return None
    return _labelled(_fitted(samples, steps), steps)


def require_some(encoded: Samples) -> None:
    """Refuse a dataset of which nothing is left.

    Raises:
        UserError: with the counts, which say why.
    """
    if not len(encoded):
        raise UserError(
            tr("no row is left to train on.\n{account}", account=encoded.stats.text()),
            hint=tr("'xtuner check-custom-dataset CONFIG' tells why."),
        )


def map_one(row: Row, steps: Steps) -> dict[str, Any]:
    """One row, mapped and with its template.

    Raises:
        RowError: when the map function cannot read it.
    """
    try:
        mapped = dict(row) if steps.map_row is None else dict(row) | dict(steps.map_row(row))
        for turn in _given_turns(mapped):
            question_of(turn)
            if steps.with_output:
                text_value(turn.get("output"))
        if steps.renames:
            mapped = {steps.renames.get(name, name): value for name, value in mapped.items()}
        if steps.add_template is not None and mapped.get("conversation"):
            mapped |= steps.add_template(mapped)
        return mapped
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        name = getattr(steps.map_row, "__name__", "dataset_map_fn")
        fields = ", ".join(row)
        raise RowError(
            tr(
                "{name} cannot read it ({error_type}: {error}); its fields are: {fields}",
                name=name,
                error_type=type(error).__name__,
                error=error,
                fields=fields,
            ),
            hint=_hint_for(row),
            where=Where(key="dataset_map_fn"),
        ) from error


def _hint_for(row: Row) -> str:
    """What to do about a row that the map function cannot read."""
    if hint := loader_hint(row):
        return f"{hint}."
    return tr("'xtuner check-custom-dataset CONFIG' names the map function that fits.")


def _given_turns(mapped: Row) -> list[Mapping[str, Any]]:
    turns = mapped.get("conversation")
    return [t for t in turns if isinstance(t, Mapping)] if isinstance(turns, list) else []


def map_rows(rows: Iterable[Row], numbers: Iterable[int], steps: Steps) -> list[dict[str, Any]]:
    """Rows, mapped and with their template.

    Raises:
        UserError: with ``bad_rows='error'`` for rows that cannot be read, naming them.
    """
    mapped, bad = [], {}
    for number, row in zip(numbers, rows, strict=True):
        try:
            mapped.append(map_one(row, steps))
        except RowError as error:
            bad[number] = error
    _note_bad(bad, TokenStats(), steps)
    return mapped


def _row_dicts(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def _encoded(
    rows: Sequence[Row], numbers: Sequence[int], steps: Steps, encoder: SegmentEncoder
) -> Samples:
    """The samples of some rows; their stats say what is dropped or truncated."""
    stats = TokenStats(rows_in=len(rows), dropped={"empty": [], "no_label": [], "too_long": []})
    bad: dict[int, RowError] = {}
    alone: dict[int, list[Sample]] = {}
    turns: dict[int, Sequence[Row]] = {}  # of the rows that are tokenised together
    for number, row in zip(numbers, rows, strict=True):
        try:
            mapped = map_one(row, steps)
            _require_all_shown(number, mapped, steps)
            by_itself = _by_itself(mapped, steps)
            own = [] if by_itself is not None else _turns(mapped["conversation"], steps)
        except RowError as error:
            bad[number] = error
            continue
        if by_itself is not None:
            alone[number] = by_itself
        elif own:
            turns[number] = own
        else:
            stats.dropped["empty"].append(number)
    _note_bad(bad, stats, steps)
    encoded = encode_conversations(turns.values(), encoder, steps.with_output)
    samples = Samples(*encoded, np.array(list(turns), dtype=np.int64), stats)
    if alone:
        samples = Samples.joined([samples, Samples.of(alone, TokenStats())])
        samples = samples.picked(np.argsort(samples.rows, kind="stable"))
    stats.tokens_in = len(samples.input_ids)
    return _labelled(_fitted(samples, steps), steps)


def _note_bad(bad: Mapping[int, RowError], stats: TokenStats, steps: Steps) -> None:
    """Count the rows that cannot be used, or refuse them, naming the first ones."""
    if not bad:
        return
    first = [f"{steps.named(n)}: {bad[n].message}" for n in list(bad)[:FIRST_ROWS]]
    if steps.bad_rows == "drop":
        stats.dropped["bad"] = list(bad)
        stats.bad_rows = first
        return
    error = next(iter(bad.values()))
    more = "\n".join(first)
    raise UserError(
        first[0] if len(bad) == 1 else tr("rows that cannot be used:\n{more}", more=more),
        hint=" ".join(filter(None, [error.hint, tr("bad_rows='drop' leaves such rows out.")])),
        where=None if len(bad) > 1 or steps.place(min(bad)) else error.where,
    )


def _require_all_shown(number: int, mapped: Mapping[str, Any], steps: Steps) -> None:
    """Refuse tools and reasoning that the template has no place for: they would be left out.

    Raises:
        UserError: for the whole dataset, as its template is wrong.
    """
    if steps.map_row not in (None, auto_map_fn, openai_map_fn):
        return  # the user's own function has seen to them
    messages = [m for m in mapped.get("messages") or () if isinstance(m, Mapping)]
    used = {
        "tools": bool(mapped.get("tools")),
        "tool_calls": any(m.get("tool_calls") for m in messages),
    }
    own = str(getattr(steps.tokenizer, "chat_template", None) or "")
    is_own = getattr(steps.add_template, "template", None) == AUTO_TEMPLATE
    if not is_own and not used["tool_calls"]:
        used["tool"] = any(m.get("role") in ("tool", "function") for m in messages)
    if not is_own and steps.thinking != "drop":
        used |= {name: True for name in map(reasoning_field, messages) if name}
    if not any(used.values()):
        return
    missing = [name for name, there in used.items() if there and not (is_own and name in own)]
    if missing:
        raise UserError(
            tr(
                "{place} has {missing}, which the prompt template has no place for",
                place=steps.named(number),
                missing=", ".join(missing),
            ),
            hint=tr("template=PROMPT_TEMPLATE.auto: the tokenizer's own chat template has it.")
            if all(name in own for name in missing)
            else tr(
                "the tokenizer's own chat template has none either: use a tokenizer whose template "
                "has tools, such as Qwen3's, or write the tools into the text."
            )
            if any(used.get(name) for name in ("tools", "tool_calls", "tool"))
            else tr("train_thinking='drop' leaves the reasoning out."),
            where=Where(key="template_map_fn"),
        )


def _by_itself(mapped: Mapping[str, Any], steps: Steps) -> list[Sample] | None:
    """The samples of a row that is tokenised already or has the tokenizer's own template.

    Returns:
        None for a row whose turns are to be tokenised together with others.
    """
    own_template = getattr(steps.add_template, "template", None) == AUTO_TEMPLATE
    reads_messages = steps.map_row in (None, auto_map_fn, openai_map_fn)
    talk = mapped.get("messages") if own_template and reads_messages else None
    if talk:
        return _by_own_template(talk, mapped.get("tools"), steps)
    if "conversation" in mapped:
        if not own_template or not mapped["conversation"]:
            return None
        return _by_own_template(messages_of(mapped["conversation"]), None, steps)
    if "input_ids" in mapped:
        ids = list(mapped["input_ids"])
        labels = mapped.get("labels")
        return [{"input_ids": ids, "labels": ids if labels is None else list(labels)}]
    raise RowError(
        tr("it has no 'conversation'; its fields are: {mapped}", mapped=", ".join(mapped)),
        hint=tr(
            "set dataset_map_fn to the function of your format: "
            "'xtuner list-dataset-format' lists them."
        ),
        where=Where(key="dataset_map_fn"),
    )


def _turns(conversation: Sequence[Row], steps: Steps) -> Sequence[Row]:
    """The turns with the loss where it belongs.

    Raises:
        RowError: when they are no turns.
    """
    try:
        conversation = [turn_for(steps.thinking, turn) for turn in conversation]
        for turn in conversation:
            _ = turn["output"], question_of(turn)
            _ = is_on(turn, "output_with_loss"), is_on(turn, "need_eos_token")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise RowError(
            tr("a turn is not {{'input', 'output'}} ({error})", error=f"{error!r:.80}"),
            where=Where(key="dataset_map_fn"),
        ) from error
    if steps.train_on != "last_answer":
        return conversation
    before = [{**turn, "output_with_loss": False} for turn in conversation[:-1]]
    return [*before, conversation[-1]]


def _by_own_template(
    talk: Sequence[Row], tools: str | Sequence[Mapping[str, Any]] | None, steps: Steps
) -> list[Sample]:
    from jinja2 import TemplateError

    try:
        return encode_messages(
            talk,
            steps.tokenizer,
            tools=tools,
            train_on=steps.train_on,
            thinking=steps.thinking,
            template_arguments=getattr(steps.add_template, "template_arguments", None),
        )
    # Templates fail with any of these; slow tokenizers have no offsets.
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        TemplateError,
        NotImplementedError,
    ) as error:
        raise RowError(_refusal(talk, error), where=Where(key="template_map_fn")) from error


def _refusal(talk: Sequence[Row], error: Exception) -> str:
    """What to say of a conversation that the tokenizer's template refuses."""
    if talk[0].get("role") == "system" and "system" in str(error).lower():
        return tr(
            "the chat template takes no system message ({error}): delete it, or write its text "
            "at the beginning of the first question",
            error=error,
        )
    return tr("the chat template refuses it: {error}", error=f"{type(error).__name__}: {error}")


def _fitted(samples: Samples, steps: Steps) -> Samples:
    """The samples for the next stage: cut, split, dropped or refused where they are too long."""
    stats, lengths, limit = samples.stats, samples.lengths, steps.max_length
    if not limit or not (lengths > limit).any():
        return samples
    too_long = lengths > limit
    if steps.long_samples == "error":
        number, length = samples.rows[too_long][0], lengths[too_long][0]
        raise UserError(
            tr(
                "{place} has {length} tokens, more than max_length={limit}",
                place=steps.named(int(number)),
                length=length,
                limit=limit,
            ),
            where=Where(key="max_length"),
        )
    if steps.long_samples == "drop":
        stats.dropped["too_long"] += np.unique(samples.rows[too_long]).tolist()
        stats.tokens_dropped += int(lengths[too_long].sum())
        return samples.chosen(~too_long)
    if steps.long_samples == "split":
        parts = np.maximum(-(-lengths // limit), 1)
        sizes = np.full(parts.sum(), limit)
        sizes[np.cumsum(parts) - 1] = lengths - limit * (parts - 1)
        return replace(samples, lengths=sizes, rows=np.repeat(samples.rows, parts))
    stats.rows_truncated += np.unique(samples.rows[too_long]).tolist()
    stats.tokens_truncated += int((lengths - limit)[too_long].sum())
    starts = np.cumsum(lengths) - lengths
    keep = np.arange(len(samples.input_ids)) - np.repeat(starts, lengths) < limit
    ids, labels = samples.input_ids[keep], samples.labels[keep]
    return Samples(ids, labels, np.minimum(lengths, limit), samples.rows, stats)


def _labelled(samples: Samples, steps: Steps) -> Samples:
    """The samples of rows that have something to train; their stats are completed."""
    if steps.train_on == "everything":
        ids = samples.input_ids
        samples.labels = np.where(ids >= 0, ids, np.int32(IGNORE_INDEX))
    stats, supervised = samples.stats, samples.supervised()
    if steps.with_output:
        keep = np.isin(samples.rows, samples.rows[supervised > 0])
        stats.dropped["no_label"] += np.unique(samples.rows[~keep]).tolist()
        stats.tokens_dropped += int(samples.lengths[~keep].sum())
        samples = samples if keep.all() else samples.chosen(keep)
    stats.rows_trained = len(np.unique(samples.rows))
    stats.tokens_trained = len(samples.input_ids)
    stats.tokens_supervised = int(supervised.sum())
    return samples
