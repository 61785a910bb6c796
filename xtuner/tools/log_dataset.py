"""``xtuner log-dataset``: any sample or pack of a config as the model sees it."""

from __future__ import annotations

import argparse
import bisect
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any

from xtuner.tools.arguments import add_config_options
from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr

CHOICES = ("chosen", "rejected")
SHOWS = ("text", "masked_text", "input_ids", "labels", "all")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("config", help=tr("name or path of a config"))
    parser.add_argument(
        "--index",
        type=int,
        default=0,
        help=tr("which sample; negative counts from the end"),
    )
    parser.add_argument(
        "--show",
        choices=SHOWS,
        default="text",
        help=tr("text: trained tokens coloured; masked_text: the others as [-100]; ids; or all"),
    )
    parser.add_argument("--html", metavar="FILE", help=tr("write an HTML file as well"))
    add_config_options(parser)


def run(args: argparse.Namespace) -> int:
    """Build the dataset as train does, and show one sample.

    Returns:
        0.
    """
    from rich.console import Console

    from xtuner.config import load_config
    from xtuner.doctor.encoded import as_pack
    from xtuner.doctor.pictures import pictures_of
    from xtuner.doctor.show import html_page, print_sample, sample_html, show_sample
    from xtuner.tools.train_dataset import build, call_before_run, train_dataset_of
    from xtuner.utils.files import write_text

    cfg = load_config(args.config, args.cfg_options)
    settings = train_dataset_of(cfg, args.config)
    call_before_run(cfg)
    tokenizer = tokenizer_of(cfg._to_lazy_dict(), settings, build)
    dataset = build(settings)
    index = position(args.index, len(dataset))
    sample = as_pack(dataset[index])
    ids, labels, cu_seqlens = tokens_of(sample)
    is_pair = "input_ids" not in sample
    shown = show_sample(
        tr("sample {index} of {count:,}", index=index, count=len(dataset)),
        ids,
        labels,
        tokenizer.decode,
        cu_seqlens=cu_seqlens,
        sources=CHOICES if is_pair else sources_of(settings, dataset, index, sample),
        pictures=pictures_of(sample.get("images") or []),
    )
    if args.show in ("text", "all"):
        print_sample(shown, Console(highlight=False))
    if args.show in ("masked_text", "all"):
        print(masked_text(ids, labels, tokenizer.decode))
    if args.show in ("input_ids", "all"):
        print(f"input_ids: {ids}")
    if args.show in ("labels", "all"):
        print(f"labels: {labels}")
    if args.html:
        write_text(args.html, html_page(shown.title, sample_html(shown)))
        print(tr("The sample is in {html}", html=args.html))
    return 0


def tokens_of(sample: Mapping[str, Any]) -> tuple[list[int], list[int], list[int] | None]:
    """Ids, labels and ``cu_seqlens`` of a sample, of a pack, or of a pair of answers.

    Raises:
        UserError: when the sample has none.
    """
    if "input_ids" in sample:
        cu_seqlens = _ints(sample["cumulative_len"]) if "cumulative_len" in sample else None
        return _ints(sample["input_ids"]), _ints(sample["labels"]), cu_seqlens
    if all(f"{choice}_ids" in sample for choice in CHOICES):
        ids = [_ints(sample[f"{choice}_ids"]) for choice in CHOICES]
        labels = [_ints(sample[f"{choice}_labels"]) for choice in CHOICES]
        return ids[0] + ids[1], labels[0] + labels[1], [0, len(ids[0]), len(ids[0]) + len(ids[1])]
    raise UserError(
        tr("samples of this dataset have no input_ids, only {sample}", sample=", ".join(sample)),
        hint=tr("'xtuner check-custom-dataset' examines its rows."),
    )


def tokenizer_of(
    cfg: Mapping[str, Any], dataset: Mapping[str, Any], build: Callable[[Any], Any]
) -> Any:
    """The tokenizer of a dataset: its own or its processor's, of its first part, or the config's.

    Args:
        cfg: the whole config.
        dataset: the settings of the dataset.
        build: makes what settings describe.

    Raises:
        UserError: when there is none.
    """
    parts = dataset.get("datasets") or [dataset.get("dataset_cfg") or {}]
    for holder in (dataset, *parts, cfg):
        if isinstance(holder, dict) and holder.get("tokenizer"):
            return build(holder["tokenizer"])
        if isinstance(holder, dict) and holder.get("processor"):
            return build(holder["processor"]).tokenizer
    raise UserError(
        tr("the config has no tokenizer"),
        hint="tokenizer = dict(type=AutoTokenizer.from_pretrained, ...)",
    )


def position(index: int, count: int) -> int:
    """An index from 0.

    Raises:
        UserError: when there are fewer samples.
    """
    if -count <= index < count:
        return index % count
    raise UserError(
        tr("there is no sample {index}: the dataset has {count}", index=index, count=count),
        hint=tr("--index takes 0 to {count}.", count=count - 1),
    )


def masked_text(
    ids: Sequence[int], labels: Sequence[int], decode: Callable[[list[int]], str]
) -> str:
    """The sample in order, each token that is not trained as ``[-100]``."""
    from xtuner.doctor.show import decode_tokens
    from xtuner.utils.constants import IGNORE_INDEX
    from xtuner.utils.terminal import visible

    text, run_of = "", []
    for token, label in zip(ids, labels, strict=True):
        if label != IGNORE_INDEX:
            run_of.append(token)
            continue
        text += (decode_tokens(run_of, decode) if run_of else "") + f"[{IGNORE_INDEX}]"
        run_of = []
    return visible(text + (decode_tokens(run_of, decode) if run_of else ""))


def _ints(values: Any) -> list[int]:
    return [int(value) for value in (values.tolist() if hasattr(values, "tolist") else values)]


def sources_of(
    settings: Mapping[str, Any], dataset: Sized, index: int, sample: Mapping[str, Any]
) -> list[str]:
    """``file:line`` of each row of a sample; empty when the dataset does not keep row numbers."""
    from xtuner.doctor.parts import find_parts
    from xtuner.doctor.places import Places

    rows = _ints(sample.get("rows") or [])
    if not rows:
        return []
    parts = find_parts(settings)
    ends = getattr(dataset, "cumulative_sizes", None) or [len(dataset)]
    place = Places(parts[bisect.bisect_right(ends, index)])
    return [str(place(row)) for row in rows]
