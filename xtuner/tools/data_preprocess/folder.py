"""``xtuner preprocess folder``: tokenize a folder of data files of one format, without a config."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from xtuner.doctor.layouts import BY_MAP_FN
from xtuner.tools.arguments import add_trust_remote_code
from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr

FORMATS = {one.name: one for one in BY_MAP_FN.values() if not one.preference}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("--data-folder", required=True, help=tr("the data files"))
    parser.add_argument("--save-folder", required=True, help=tr("folder to write"))
    parser.add_argument("--tokenizer-path", required=True, help=tr("model or tokenizer"))
    parser.add_argument(
        "--dataset-format",
        choices=sorted(FORMATS),
        metavar="NAME",
        help=tr(
            "row layout; without it rows have 'conversation'. One of: {names}",
            names=", ".join(sorted(FORMATS)),
        ),
    )
    parser.add_argument("--prompt-template", help=tr("how turns are written"))
    parser.add_argument("--max-length", type=int, default=32768, help=tr("tokens"))
    parser.add_argument("--pack-to-max-length", action="store_true", help=tr("join short rows"))
    parser.add_argument("--file-type", default=".json", help=tr("ending of the files"))
    parser.add_argument("--data-order-path", help=tr("file with the order of the files"))
    add_trust_remote_code(parser)


def run(args: argparse.Namespace) -> int:
    """Build the dataset and save it.

    Returns:
        0.
    """
    from datasets import load_dataset

    from xtuner.dataset import process_hf_dataset
    from xtuner.dataset.data_order import files_in_order
    from xtuner.dataset.map_fns import template_map_fn_factory
    from xtuner.model.remote_code import load_pretrained
    from xtuner.model.transformers_models.auto import AutoTokenizer
    from xtuner.tools.data_preprocess import prepared

    template = _template(args.prompt_template)
    files = files_in_order(args.data_folder, args.file_type, args.data_order_path)
    paths = [str(file) for file in files]
    layout = FORMATS.get(args.dataset_format or "")
    dataset = process_hf_dataset(
        dataset={"type": load_dataset, "path": _loader(args.file_type), "data_files": paths},
        tokenizer=load_pretrained(
            AutoTokenizer, args.tokenizer_path, trusted=args.trust_remote_code
        ),
        max_length=args.max_length,
        dataset_map_fn=_map_fn(layout.map_fn) if layout else None,
        template_map_fn=template_map_fn_factory(template=template) if template else None,
        remove_unused_columns=True,
        shuffle_before_pack=False,
        pack_to_max_length=args.pack_to_max_length,
    )
    folder = Path(args.save_folder)
    prepared.save(dataset, folder)
    place = folder / prepared.FOLDER
    print(
        tr(
            "{count:,} samples -> {place}\nIn a config: train_dataset = "
            "dict(type=load_from_disk, dataset_path={folder!r})",
            count=len(dataset),
            place=place,
            folder=str(place.resolve()),
        )
    )
    return 0


def _template(name: str | None) -> Any:
    from xtuner.utils.templates import PROMPT_TEMPLATE

    if name is None or name in PROMPT_TEMPLATE:
        return PROMPT_TEMPLATE[name] if name else None
    raise UserError(
        tr("there is no prompt template {name!r}", name=name),
        hint=f"--prompt-template {{{','.join(sorted(PROMPT_TEMPLATE))}}}",
    )


def _map_fn(name: str) -> Any:
    from xtuner.dataset import map_fns

    return getattr(map_fns, name)


def _loader(file_type: str) -> str:
    kind = file_type.removesuffix(".gz").lstrip(".")
    return kind if kind in ("csv", "parquet", "arrow") else "json"
