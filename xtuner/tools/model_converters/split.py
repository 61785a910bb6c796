"""``xtuner convert split``: a model in one file per tensor, for loaders that want it so."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from xtuner.utils.files import copy_side_files
from xtuner.utils.lang import tr


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("src_dir", help=tr("a model's folder"))
    parser.add_argument("dst_dir", help=tr("the folder to write"))


def run(args: argparse.Namespace) -> int:
    """Write the weights, one tensor a file, in the format they have (safetensors or ``.bin``)."""
    import torch
    from rich.progress import track
    from safetensors.torch import save_file

    from xtuner.export import model_folder
    from xtuner.export.shards import check_space
    from xtuner.export.weights import BIN, INDEX_SUFFIX, SAFETENSORS, Weights
    from xtuner.utils.files import written_aside

    out = Path(args.dst_dir)
    source = model_folder.find_model(args.src_dir)
    model_folder.check_output(out, [source])
    weights = Weights(source)
    check_space(out, weights.nbytes)
    name = SAFETENSORS if weights.files[0].suffix == ".safetensors" else BIN
    stem, _, suffix = name.rpartition(".")
    with written_aside(out) as aside:
        aside.mkdir(parents=True)
        copy_side_files(source, aside)
        weight_map = {}
        count = len(weights.infos)
        for number, key in enumerate(track(weights.infos, tr("splitting")), 1):
            file = f"{stem}-{number:05d}-of-{count:05d}.{suffix}"
            weight_map[key] = file
            tensor = {key: weights.read(key).clone()}
            if suffix == "safetensors":
                save_file(tensor, aside / file, metadata={"format": "pt"})
            else:
                torch.save(tensor, aside / file)
        index = {"metadata": {"total_size": weights.nbytes}, "weight_map": weight_map}
        (aside / f"{name}{INDEX_SUFFIX}").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    print(tr("wrote {count} files into {out}", count=count, out=out))
    return 0
