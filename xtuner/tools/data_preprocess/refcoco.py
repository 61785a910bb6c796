"""``xtuner preprocess refcoco``: turn RefCOCO annotations into JSON that LLaVA configs read.

The folder has ``refcoco/``, ``refcoco+/`` or ``refcocog/``, each with ``instances.json`` (images
and boxes, COCO layout) and ``refs(<who>).p`` (what people call the boxes). ``train.json`` gets one
row a referred object: ``{id, image, width, height, bbox: [x1, y1, x2, y2] in pixels, sents}``;
``eval_<name>_<split>.json`` the same for the other splits.
"""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

NAMES = ("refcoco", "refcoco+", "refcocog")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("--ann-path", default="data/refcoco_annotations", help=tr("annotations"))
    parser.add_argument(
        "--image-path",
        default="data/llava_data/llava_images/coco/train2017",
        help=tr("folder of the COCO images"),
    )
    parser.add_argument("--save-path", default="./", help=tr("folder for the JSON files"))


def run(args: argparse.Namespace) -> int:
    """Write one file a split.

    Returns:
        0.
    """
    from xtuner.utils.files import write_text

    folders = [Path(args.ann_path) / name for name in NAMES]
    folders = [folder for folder in folders if (folder / "instances.json").is_file()]
    if not folders:
        raise UserError(
            tr(
                "no {names} with instances.json in {ann_path}",
                names=tr(" or ").join(NAMES),
                ann_path=args.ann_path,
            ),
            hint="--ann-path FOLDER (https://github.com/lichengunc/refer)",
        )
    if not Path(args.image_path).is_dir():
        raise UserError(
            tr("there is no folder {image_path}", image_path=args.image_path),
            hint="--image-path data/llava_data/llava_images/coco/train2017",
        )
    splits: dict[str, list[dict[str, Any]]] = {}
    for folder in folders:
        for split, row in rows_of(folder, Path(args.image_path)):
            name = "train" if split == "train" else f"eval_{folder.name}_{split}"
            splits.setdefault(name, []).append(row)
    for name, rows in splits.items():
        target = Path(args.save_path) / f"{name}.json"
        text = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        write_text(target, f"[\n{text}\n]\n")
        print(tr("{count:,} rows -> {target}", count=len(rows), target=target))
    return 0


def rows_of(folder: Path, images_folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Split and row of each referred object of one dataset."""
    instances = json.loads((folder / "instances.json").read_text("utf-8"))
    images = {image["id"]: image for image in instances["images"]}
    boxes = {one["id"]: one["bbox"] for one in instances["annotations"]}
    # Configs give the folder above ``coco/train2017``.
    prefix = "/".join(images_folder.parts[-2:])
    for ref in _references(folder):
        image = images[ref["image_id"]]
        x, y, width, height = boxes[ref["ann_id"]]
        yield (
            ref["split"],
            {
                "id": f"{folder.name}-{ref['ref_id']}",
                "image": f"{prefix}/{_file_name(image, images_folder)}",
                "width": image["width"],
                "height": image["height"],
                "bbox": [x, y, x + width, y + height],
                "sents": [sentence["sent"] for sentence in ref["sentences"]],
            },
        )


def _file_name(image: Mapping[str, Any], folder: Path) -> str:
    """The image's file: of 2014, or the same under its 2017 name."""
    old = str(image["file_name"])
    return old if (folder / old).is_file() else old.rpartition("_")[2]


def _references(folder: Path) -> list[dict[str, Any]]:
    files = sorted(folder.glob("refs*.p"))
    if not files:
        raise UserError(tr("refs(<who>).p is missing"), where=Where(str(folder)))
    # UMD's split is the usual one where there are two.
    file = next((one for one in files if "umd" in one.name or "unc" in one.name), files[0])
    with file.open("rb") as stream:
        try:
            references: list[dict[str, Any]] = _PlainUnpickler(stream, encoding="utf-8").load()
        except pickle.UnpicklingError as error:
            raise UserError(str(error), where=Where(str(file))) from error
    return references


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, dicts, texts and numbers, and refuses whatever could run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(
            tr(
                "this file wants to run {module}.{name}; annotations have no need to",
                module=module,
                name=name,
            )
        )
