"""Configs for any model folder and the user's own rows, in the five parts of the catalogue."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from xtuner.configs.cards import DatasetCard, ModelCard, Source
from xtuner.configs.datasets import DATASETS
from xtuner.configs.models import MODELS
from xtuner.configs.names import ConfigName
from xtuner.configs.render import render_config
from xtuner.configs.settings import METHODS

MIN_PACKS = 200
"""Rows are packed only where this many packs come of it: fewer would be too few steps."""
ENOUGH_STEPS = 200
MAX_EPOCHS = 10
MAX_ACCUMULATION = 16
MAX_BATCH = 8
SHORT_BATCH = 512
"""Tokens of a micro-batch of several rows, on average: longer rows are computed one by one."""
OF_A_TEMPLATE = 40
"""Tokens that a chat template adds to a row, about."""
PAIRS_LR = {"dpo": (5e-7, 5e-6), "orpo": (5e-6, 5e-5), "reward": (2e-5, 1e-4)}
"""By ``Method.kind`` of weights and of adapters, which begin at zero and take ten times that."""


@dataclass(frozen=True)
class Rows:
    """What is known of the user's rows.

    Args:
        files: their paths.
        count: how many there are.
        characters: of all of them.
        map_fn: the function of ``xtuner.dataset.map_fns`` that reads a row; None where rows are
            conversations already.
        fields: question and answer, where a function of the config's own reads them.
        questions: a few, to ask while training.
        image_folder: what the paths of images are relative to; None for rows of text.
        images: those of ``questions``, None where a question has none.
        videos: likewise; a list of frames is a tuple.
        loader: the ``path`` of ``load_dataset`` that reads the files.
        load: its further keyword argument, as it is written.
        pairs: whether a row is a pair of answers.
    """

    files: tuple[str, ...]
    count: int
    characters: int
    map_fn: str | None
    fields: tuple[str, str] | None = None
    questions: tuple[str, ...] = ()
    image_folder: str | None = None
    images: tuple[str | None, ...] = ()
    videos: tuple[str | tuple[str, ...] | None, ...] = ()
    loader: str = "json"
    load: str = ""
    pairs: bool = False


def card_of(path: str) -> ModelCard | None:
    """The catalogue's card of a model, by its name on the hub or the name of its folder."""
    title = path.rstrip("/").rpartition("/")[2].lower()
    return next((card for card in MODELS.values() if card.title.lower() == title), None)


def render_for(card: ModelCard, method: str, dataset: DatasetCard, name: str) -> str:
    """The text of a config.

    Args:
        card: the model; ``path`` is what is loaded.
        method: of ``METHODS``.
        dataset: of the catalogue, or ``own_dataset``.
        name: of the config, for its headline.
    """
    options = {} if "max_epochs" in dataset.settings else {"max_epochs": 3}
    parsed = ConfigName(name, card, method, METHODS[method], dataset, options)
    return render_config(parsed)


def render_own(card: ModelCard, method: str, rows: Rows, name: str) -> str:
    """The text of a config that trains on the user's rows.

    Args:
        card: the model; ``path`` is what is loaded.
        method: of ``METHODS``, one for pairs of answers where the rows are such.
        rows: what is known of them.
        name: of the config, for its headline.
    """
    usual = 2048 if rows.image_folder is None else 4096
    length = int(card.settings.get("max_length", usual))
    card = replace(card, settings={**card.settings, "max_length": length})
    dataset = own_dataset(rows, length)
    if rows.pairs:
        known = METHODS[method]
        lr = PAIRS_LR[known.kind][known.adapters]
        dataset = replace(dataset, settings={**dataset.settings, "lr": lr})
        return render_for(card, method, dataset, name)
    text = render_for(card, method, dataset, name)
    if rows.fields is None:
        return text
    question, answer = rows.fields
    turn = f'{{"input": row["{question}"], "output": row["{answer}"]}}'
    function = (
        "# A row of the data as a conversation.\n"
        "def my_map_fn(row):\n"
        f'    return {{"conversation": [{turn}]}}\n\n\n'
    )
    text = re.sub(r"\bauto_map_fn, |, auto_map_fn\b", "", text)
    text = text.replace("dataset_map_fn=auto_map_fn", "dataset_map_fn=my_map_fn")
    imports, ruler, rest = text.partition("#" * 71)
    return f"{imports.rstrip()}\n\n\n{function}{ruler}{rest}"


def own_dataset(rows: Rows, max_length: int) -> DatasetCard:
    """The card of the user's rows, with epochs and accumulation that fit their number."""
    packs = rows.characters // 3 // max_length  # three characters to a token, about
    packed = packs >= MIN_PACKS and not rows.pairs
    batches = packs if packed else rows.count
    per_step = min(MAX_ACCUMULATION, max(1, batches // 20))
    together = 1 if packed or rows.pairs or rows.image_folder else _rows_at_once(rows, per_step)
    accumulate = per_step // together
    steps = max(1, batches // (accumulate * together))
    fewest, most = (1, 3) if rows.pairs else (3, MAX_EPOCHS)
    epochs = min(most, max(fewest, -(-ENOUGH_STEPS // steps)))
    is_text = rows.map_fn == "pretrain_map_fn"
    settings: dict[str, Any] = {
        "SYSTEM": "",
        "pack_to_max_length": packed,
        "batch_size": together,
        "accumulative_counts": accumulate,
        "max_epochs": epochs,
    }
    if rows.questions:
        settings["evaluation_inputs"] = list(rows.questions)
    if rows.image_folder is not None:
        return _own_images(rows, settings)
    source = Source(
        "train_dataset",
        "preference_files" if rows.pairs else "data_files",
        ("data_files", list(rows.files)),
        rows.map_fn,
        rows.load,
        rows.loader,
    )
    kind = "preference" if rows.pairs else "pretrain" if is_text else "sft"
    return DatasetCard("own", _title(rows), (source,), kind=kind, settings=settings)


def _rows_at_once(rows: Rows, per_step: int) -> int:
    """Rows of a micro-batch: a few short ones are computed faster together than one by one."""
    tokens = rows.characters // 3 // max(1, rows.count) + OF_A_TEMPLATE
    most = min(per_step, MAX_BATCH, max(1, SHORT_BATCH // tokens))
    return max(size for size in range(1, most + 1) if per_step % size == 0)


def _title(rows: Rows) -> str:
    return f"{rows.count} {'pairs' if rows.pairs else 'rows'} of your own"


def _own_images(rows: Rows, settings: dict[str, Any]) -> DatasetCard:
    """The card of the user's rows with images, like that of ``custom_vision``."""
    known = DATASETS["custom_vision"]
    (source,) = known.sources
    path = ("data_files", list(rows.files))
    part = "preference_vision" if rows.pairs else source.part
    source = replace(source, part=part, path=path, load=rows.load, loader=rows.loader)
    settings |= {"image_folder": rows.image_folder}
    if rows.questions:
        for name, given in (("evaluation_images", rows.images), ("evaluation_videos", rows.videos)):
            is_any = any(each is not None for each in given)
            settings[name] = list(given) if is_any else []
    return replace(
        known,
        title=_title(rows),
        sources=(source,),
        settings={**known.settings, **settings},
        note="",
    )


def dataset_of(name: str) -> DatasetCard | None:
    """A dataset of the catalogue for supervised fine-tuning or pretraining."""
    found = DATASETS.get(name)
    return found if found is not None and found.kind != "preference" else None


def own_card(
    path: str,
    name: str,
    settings: Mapping[str, Any],
    *,
    chat_template: bool,
    kind: str = "text",
) -> ModelCard:
    """A card of a model that the catalogue does not know.

    Args:
        path: its folder or its name on the hub.
        name: for the config.
        settings: that differ from the defaults.
        chat_template: whether its tokenizer has a chat template, which is then used.
        kind: ``text``, or ``vision`` if it takes images too.
    """
    template = "auto" if chat_template else "default"
    return ModelCard(
        name, path, 0.0, template=template, chat=chat_template, settings=settings, kind=kind
    )
