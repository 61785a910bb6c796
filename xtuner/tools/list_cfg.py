"""``xtuner list-cfg``: the configs by name, narrowed by what they train."""

from __future__ import annotations

import argparse
import itertools
import re
from typing import Any

from xtuner.configs import UnknownConfig, describe, names
from xtuner.configs.datasets import DATASETS
from xtuner.configs.models import FAMILIES, MODELS
from xtuner.configs.settings import METHODS
from xtuner.configs.unknown import nearest
from xtuner.tools.json_output import print_json
from xtuner.utils.lang import tr
from xtuner.utils.terminal import padded, width

RULER = 60
_KINDS_OF_TRAINING = {
    **{method: method for method in ("full", "lora", "qlora")},
    **{kind: f"{kind}_qlora" for kind in ("dpo", "orpo", "reward")},
}
"""What ``--models`` shows, and what of a name stands for it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("text", nargs="?", default="", help=tr("the same as --pattern"))
    parser.add_argument(
        "-p",
        "--pattern",
        default="",
        help=tr("show names that hold this text"),
    )
    parser.add_argument(
        "--model",
        default="",
        help=tr("show configs of a model whose name or hub path holds this text"),
    )
    parser.add_argument(
        "--method",
        default="",
        help=tr("show configs of a method: full, lora, qlora, dpo, ..."),
    )
    parser.add_argument(
        "--dataset",
        default="",
        help=tr("show configs of a dataset: alpaca, oasst1, ..."),
    )
    parser.add_argument(
        "--long",
        action="store_true",
        help=tr("show parameters, method, dataset and model path"),
    )
    parser.add_argument(
        "--models", action="store_true", help=tr("show families, models and methods instead")
    )
    parser.add_argument("--json", action="store_true", help=tr("print one JSON list"))


def run(args: argparse.Namespace) -> int:
    """Print the names.

    Returns:
        0, or 1 when no name fits.
    """
    args.pattern = args.pattern or args.text
    if args.models:
        return _print_models(args.pattern, as_json=args.json)
    chosen = _chosen(args)
    if args.json:
        print_json([describe(name) for name in chosen])
        return 0 if chosen else 1
    print("CONFIGS".center(RULER, "="))
    if args.pattern:
        print(f"PATTERN: {args.pattern}")
        print("-" * (RULER // 2))
    lines = _table(chosen) if args.long else chosen
    print("".join(f"{line}\n" for line in lines), end="")
    if not chosen:
        print(_nothing(args))
    print("=" * RULER)
    print(tr("{count} configs. 'xtuner list-cfg --models' lists the models.", count=len(chosen)))
    print(tr("Any other model: 'xtuner copy-cfg --model FOLDER_OR_HUB_ID --data FILE DIR'."))
    return 0 if chosen else 1


def _chosen(args: argparse.Namespace) -> list[str]:
    """The curated names that fit."""
    pattern = _plain(args.pattern)
    chosen = [name for name in names() if pattern in _plain(name)]
    if args.model or args.method or args.dataset:
        chosen = [name for name in chosen if _fits(describe(name), args)]
    return chosen


def _plain(text: str) -> str:
    """A name without what people write differently: InternLM2.5-7B is internlm2_5_7b."""
    return re.sub(r"[-. ]", "_", text.lower())


def _print_models(pattern: str, *, as_json: bool) -> int:
    """Print a line for each model, by family: its name, its size, how it can be trained."""
    shown = {
        model: facts
        for model, facts in _models().items()
        if _plain(pattern) in _plain(f"{model} {facts['path']}")
    }
    if as_json:
        print_json(shown)
        return 0 if shown else 1
    widest = max(map(len, shown), default=0)
    for family, models in itertools.groupby(shown, key=lambda model: shown[model]["family"]):
        print(family)
        for model in models:
            methods = ", ".join(shown[model]["methods"])
            print(f"  {model:<{widest}}  {_size(shown[model]['billions']):>6}  {methods}")
    if not shown:
        print(tr("No model fits."))
    print(_grammar())
    print(tr("Any other model: 'xtuner copy-cfg --model FOLDER_OR_HUB_ID --data FILE DIR'."))
    return 0 if shown else 1


def _models() -> dict[str, dict[str, Any]]:
    """Family, path, size and methods of each model: the cards, then LLaVA and InternVL."""
    models: dict[str, dict[str, Any]] = {
        card.name: {
            "family": family.__name__.rpartition(".")[2],
            "path": card.path,
            "billions": card.billions,
            "methods": _methods_of(card.name),
        }
        for family in FAMILIES
        for card in family.CARDS
    }
    for facts in map(describe, names()):
        model = facts["model"]
        if model and model not in MODELS:  # of a family with names of its own
            row = models.setdefault(model, {**facts, "methods": []})
            row["family"] = model.partition("_")[0]
            row["methods"] += [facts["method"]] * (facts["method"] not in row["methods"])
    return models


def _methods_of(model: str) -> list[str]:
    """The ways to train a model of the catalogue that have a name."""
    return [
        method
        for method, rest in _KINDS_OF_TRAINING.items()
        if _resolves(f"{model}_{rest}_alpaca_e3") or _resolves(f"{model}_{rest}")
    ]


def _size(billions: float | None) -> str:
    return f"{billions:g}B" if billions else "-"


def _fits(facts: dict[str, Any], args: argparse.Namespace) -> bool:
    """Whether a config is of the model, method and dataset asked for."""
    model = args.model.lower()
    return (
        (model in facts["model"] or model in facts["path"].lower())
        and (not args.method or _is_method(facts["method"], args.method.lower()))
        and (not args.dataset or args.dataset.lower() == facts["dataset"])
    )


def _is_method(method: str, asked: str) -> bool:
    """``dpo`` asks for every kind of DPO, ``dpo_full`` for the padded and the packed one."""
    return method == asked or method.startswith(asked + "_")


def _table(chosen: list[str]) -> list[str]:
    """A line each: name, parameters, method, dataset, path of the model."""
    rows = []
    for name in chosen:
        facts = describe(name)
        size = _size(facts["billions"])
        rows.append((name, size, facts["method"], facts["dataset"] or "-", facts["path"]))
    head = (
        tr("name"),
        tr("size"),
        tr("method"),
        tr("dataset"),
        tr("model"),
    )
    widths = [max(width(row[column]) for row in (head, *rows)) for column in range(4)]
    return [
        "  ".join(padded(cell, widest) for cell, widest in zip(row[:4], widths, strict=True))
        + f"  {row[4]}"
        for row in ([head, *rows] if rows else [])
    ]


def _resolves(name: str) -> bool:
    try:
        describe(name)
    except UnknownConfig:
        return False
    return True


def _nothing(args: argparse.Namespace) -> str:
    """What to say when no name fits."""
    if _resolves(args.pattern):
        return tr(
            "{pattern} is not listed, but it is a config: copy-cfg and train take it.",
            pattern=args.pattern,
        )
    lines = [tr("No config fits.")]
    if args.dataset and args.dataset.lower() not in DATASETS:
        there = ", ".join(DATASETS)
        lines.append(tr("Datasets are called {there}.", there=there))
    if args.method and not any(_is_method(method, args.method.lower()) for method in METHODS):
        there = ", ".join(METHODS)
        lines.append(tr("Methods are called {there}.", there=there))
    near = nearest(args.pattern, names()) if args.pattern else []
    if near:
        lines.append(tr("The nearest names:"))
        lines += [f"  {name}" for name in near]
    return "\n".join([*lines, _grammar()])


def _grammar() -> str:
    return tr(
        "A name is <model>_<method>_<dataset>_e<epochs>; those that make sense work in\n"
        "copy-cfg and train even when they are not listed."
    )
