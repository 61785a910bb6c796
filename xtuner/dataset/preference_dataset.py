"""Pairs of answers, one preferred to the other, ready for DPO, ORPO and reward models.

A row is a prompt with a chosen and a rejected answer: as message lists (``prompt``, ``chosen``,
``rejected``), as the two whole conversations without a ``prompt``, or as text; or it has the layout
of LLaMA-Factory or ms-swift. The tokenizer's own chat template writes it; what it adds for the
answer is trained, its prompt is not.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner.dataset.json_file import read_json_rows
from xtuner.dataset.map_fns import row_function
from xtuner.dataset.prepare import cache, packing
from xtuner.dataset.prepare.rows import RowPlaces, load_rows
from xtuner.dataset.prepare.token_stats import TokenStats, attach
from xtuner.dataset.vision_language.pairs import plain_pair
from xtuner.registry import BUILDER
from xtuner.tokenization.content import content_of, text_of
from xtuner.tokenization.offsets import encode_with_offsets
from xtuner.utils.constants import IGNORE_INDEX, PREFERENCE_SIDES
from xtuner.utils.dataset_settings import require_settings
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from datasets import Dataset

    from xtuner.utils.types import MapFunction, Tokenizer

Message = Mapping[str, Any]


def build_preference_dataset(
    dataset: Dataset | Mapping[str, Any],
    tokenizer: Tokenizer | Mapping[str, Any],
    max_length: int,
    dataset_map_fn: MapFunction | str | Mapping[str, Any] | None = None,
    is_dpo: bool = True,
    is_reward: bool = False,
    reward_token_id: int = -1,
    num_proc: int = 32,
    use_varlen_attn: bool = False,
    max_packed_length: int = 16384,
    shuffle_before_pack: bool = True,
    *,
    seed: int = 0,
) -> Dataset:
    """Prepare pairs of answers.

    Args:
        dataset: a ``datasets.Dataset`` or ``DatasetDict``, or the config to build it from.
        tokenizer: a fast tokenizer with a chat template, or the config to build it from.
        max_length: tokens of a prompt with one answer; what is longer is cut at its end.
        dataset_map_fn: row → ``{'prompt', 'chosen', 'rejected'}``; None when rows are so already,
            or as those of LLaMA-Factory and ms-swift.
        is_dpo: answers get labels (DPO and ORPO).
        is_reward: each answer ends in ``reward_token_id``, where the reward is read.
        reward_token_id: see ``is_reward``.
        num_proc: kept from v0.1; the result does not depend on processes, nor do we start any.
        use_varlen_attn: put several pairs into one row, where no answer sees another.
        max_packed_length: tokens of such a row.
        shuffle_before_pack: shuffle the pairs (by ``seed``) before they are packed.
        seed: of the shuffling.

    Returns:
        Columns ``chosen_ids``, ``chosen_labels``, ``rejected_ids``, ``rejected_labels``, ``length``
        and ``rows``; packed ``input_ids``, ``labels``, ``position_ids``, ``cumulative_len`` (chosen
        and rejected in turns), ``length`` and ``rows``.

    Raises:
        UserError: when rows cannot be read, naming the row, or settings contradict each other.
    """
    require_settings("build_preference_dataset", locals())
    built: Tokenizer = BUILDER.build(tokenizer) if isinstance(tokenizer, Mapping) else tokenizer
    if not built.chat_template:
        raise UserError(
            tr("the tokenizer has no chat template"),
            hint=tr(
                "preferences are written with it: start from a chat model, or from one that "
                "'xtuner convert' wrote."
            ),
            where=Where(key="tokenizer"),
        )
    rows = load_rows(dataset, "train")
    map_row = row_function(dataset_map_fn)
    settings = {
        "max_length": max_length,
        "reward_token": reward_token_id if is_reward else None,
        "packed": max_packed_length if use_varlen_attn else None,
        "shuffle": shuffle_before_pack,
        "seed": seed,
    }
    import xtuner.dataset.preference_dataset as this

    key = cache.content_key(rows, built, [map_row], settings, [this, packing])

    def write(folder: Path) -> None:
        places = RowPlaces(dataset, "train")
        _prepare(rows, built, map_row, settings, places).save_to_disk(str(folder))

    return cache.prepared_once(key, write)


def load_jsonl_dataset(data_files: str | Sequence[str]) -> Dataset:
    """Rows of JSON-lines files.

    Args:
        data_files: a file, or several.

    Raises:
        UserError: when a file is missing, or a line of it is not JSON.
    """
    from datasets import Dataset

    files = [data_files] if isinstance(data_files, str | Path) else list(data_files)
    return Dataset.from_list([row for file in files for row in read_json_rows(file)])


def orpo_dpo_mix_40k_map_fn(example: Mapping[str, Any]) -> dict[str, Any]:
    """``mlabonne/orpo-dpo-mix-40k``: two conversations that differ in their last message."""
    chosen, rejected = example["chosen"], example["rejected"]
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def intel_orca_dpo_map_fn(example: Mapping[str, Any]) -> dict[str, Any]:
    """``Intel/orca_dpo_pairs``: a system prompt, a question and two answers."""
    return {
        "prompt": [
            {"role": "system", "content": example["system"]},
            {"role": "user", "content": example["question"]},
        ],
        "chosen": [{"role": "assistant", "content": example["chosen"]}],
        "rejected": [{"role": "assistant", "content": example["rejected"]}],
    }


def _prepare(
    rows: Dataset,
    tokenizer: Tokenizer,
    map_row: MapFunction | None,
    settings: Mapping[str, Any],
    place: RowPlaces,
) -> Dataset:
    from datasets import Dataset
    from jinja2 import TemplateError

    refusals = (KeyError, TypeError, IndexError, AttributeError, ValueError, TemplateError)
    stats = TokenStats(rows_in=len(rows), dropped={"no_label": []})
    pairs = []
    for number, row in enumerate(rows):
        try:
            mapped = map_row(row) if map_row is not None else row
            messages = messages_of_pair(mapped or {})
            sides = [_encode(messages[0], answer, tokenizer) for answer in messages[1:]]
        except refusals as error:
            where = place(number)
            name = tr("row {number}", number=number) if where is None else f"{where}"
            raise _unreadable(name, row, error) from error
        pair = _fitted(number, sides, settings, stats)
        pairs += [pair] if pair else []
    if not pairs:
        said = stats.text()
        raise UserError(tr("no pair is left to train on.\n{said}", said=said))
    stats.rows_trained = len(pairs)
    stats.tokens_trained = sum(pair["length"] for pair in pairs)
    stats.tokens_supervised = sum(
        label != IGNORE_INDEX
        for pair in pairs
        for side in PREFERENCE_SIDES
        for label in pair[f"{side}_labels"]
    )
    made = Dataset.from_list(_packed(pairs, settings) if settings["packed"] else pairs)
    attach(made, stats)
    return made


def messages_of_pair(
    row: Mapping[str, Any],
) -> tuple[list[Message], list[Message], list[Message]]:
    """Prompt, chosen and rejected of a row as message lists, whichever way they are written.

    Raises:
        KeyError, TypeError, ValueError: when the row is no pair of answers.
    """
    row = plain_pair(row)
    chosen, rejected = (_as_messages(row[side], "assistant") for side in PREFERENCE_SIDES)
    if row.get("prompt") is not None:
        prompt = _as_messages(row["prompt"], "user")
        begins = len(prompt) < len(chosen) and chosen[: len(prompt)] == prompt
        if begins and rejected[: len(prompt)] == prompt:  # whole conversations beside it
            return prompt, chosen[len(prompt) :], rejected[len(prompt) :]
        return prompt, chosen, rejected
    if len(chosen) < 2 or chosen[:-1] != rejected[:-1]:
        raise ValueError("without a 'prompt', both answers must follow the same messages")
    return chosen[:-1], chosen[-1:], rejected[-1:]


def _as_messages(value: str | Sequence[Message], role: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return [{"role": message["role"], "content": text_of(content_of(message))} for message in value]


def _encode(
    prompt: list[Message], answer: list[Message], tokenizer: Tokenizer
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt with its answer, and labels: those of the answer alone."""
    before = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    text = tokenizer.apply_chat_template([*prompt, *answer], tokenize=False)
    if not text.startswith(before):  # a template whose prompt for an answer is not in the answer
        before = tokenizer.apply_chat_template(prompt, tokenize=False)
    if not text.startswith(before):
        raise ValueError("the chat template writes the prompt differently once an answer follows")
    ids, places = encode_with_offsets(tokenizer, text)
    labels = [
        token if first >= len(before) else IGNORE_INDEX
        for token, (first, _) in zip(ids, places, strict=True)
    ]
    return ids, labels


def _fitted(
    number: int,
    sides: Sequence[tuple[list[int], list[int]]],
    settings: Mapping[str, Any],
    stats: TokenStats,
) -> dict[str, Any] | None:
    """A pair cut to the length, with its reward tokens; None when an answer is all cut away."""
    token = settings["reward_token"]
    limit = settings["max_length"] - (token is not None)
    stats.tokens_in += sum(len(ids) for ids, _ in sides)
    if any(len(ids) > limit for ids, _ in sides):
        stats.rows_truncated.append(number)
        stats.tokens_truncated += sum(max(0, len(ids) - limit) for ids, _ in sides)
    pair: dict[str, Any] = {}
    for side, (ids, labels) in zip(PREFERENCE_SIDES, sides, strict=True):
        ids, labels = ids[:limit], labels[:limit]
        if all(label == IGNORE_INDEX for label in labels):
            stats.rows_truncated = [row for row in stats.rows_truncated if row != number]
            stats.dropped["no_label"].append(number)
            stats.tokens_dropped += sum(min(limit, len(ids)) for ids, _ in sides)
            return None
        if token is not None:
            ids = [*ids, token]
            labels = [IGNORE_INDEX] * (len(ids) - 1) + [PREFERENCE_SIDES.index(side)]
        pair |= {f"{side}_ids": ids, f"{side}_labels": labels}
    length = len(pair["chosen_ids"]) + len(pair["rejected_ids"])
    return {**pair, "length": length, "rows": [number]}


def _packed(pairs: list[dict[str, Any]], settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of several pairs; a pair stays whole, its chosen answer before its rejected one."""
    if settings["shuffle"]:
        pairs = random.Random(settings["seed"]).sample(pairs, len(pairs))
    made = []
    for parts in packing.pack_whole([pair["length"] for pair in pairs], settings["packed"]):
        members = [pairs[number] for number, _, _ in parts]
        ids, labels = (
            [pair[f"{side}_{kind}"] for pair in members for side in PREFERENCE_SIDES]
            for kind in ("ids", "labels")
        )
        whole = [(number, 0, len(sample)) for number, sample in enumerate(ids)]
        row: dict[str, Any] = dict(packing.join(ids, labels, whole))
        row |= {"length": len(row["input_ids"])}
        made.append(row | {"rows": [number for pair in members for number in pair["rows"]]})
    return made


def _unreadable(name: str, row: Mapping[str, Any], error: Exception) -> UserError:
    why = f"{type(error).__name__}: {error}"
    fields = ", ".join(row)
    return UserError(
        tr(
            "{name} is no pair of answers ({why}); its fields are: {fields}",
            name=name,
            why=why,
            fields=fields,
        ),
        hint=tr(
            "rows need prompt, chosen and rejected: set dataset_map_fn to a function that makes "
            "them, for example orpo_dpo_mix_40k_map_fn."
        ),
        where=Where(key="dataset_map_fn"),
    )
