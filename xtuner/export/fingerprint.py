"""The fingerprint of a base model, saved with an adapter and compared when it is merged.

It covers the names and shapes of all tensors and the values of a few. Values are rounded to
bfloat16 first, so that the same model saved in another dtype has the same fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from xtuner.export.weights import Weights
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

FILE_NAME = "xtuner_base.json"
SAMPLED = 8


def fingerprint(base: Weights) -> dict[str, str]:
    """``shapes`` and ``values`` of a model's weights, as hexadecimal digests."""
    names = sorted(base.infos)
    shapes = hashlib.sha256()
    for name in names:
        shapes.update(f"{name} {list(base.infos[name].shape)}\n".encode())
    values = hashlib.sha256()
    step = max(1, len(names) // SAMPLED)
    for name in names[::step]:
        sample = base.read(name).reshape(-1)[:4096].to(torch.bfloat16)
        values.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return {"shapes": shapes.hexdigest()[:32], "values": values.hexdigest()[:32]}


def write_fingerprint(adapter: Path, base_name: str, base: Weights) -> None:
    """Write the base's name and fingerprint into the adapter's folder."""
    record = {"base_model_name_or_path": base_name, "fingerprint": fingerprint(base)}
    (adapter / FILE_NAME).write_text(json.dumps(record, indent=2) + "\n", "utf-8")


def check_fingerprint(adapter: Path, base: Weights) -> str:
    """Compare a base model with the one that the adapter was trained on.

    Returns:
        ``same``, or ``unknown`` when the adapter has no fingerprint.

    Raises:
        UserError: when it is another model.
    """
    file = adapter / FILE_NAME
    if not file.is_file():
        return "unknown"
    record = json.loads(file.read_text("utf-8"))
    trained_on, found = record["fingerprint"], fingerprint(base)
    if found == trained_on:
        return "same"
    name = record["base_model_name_or_path"]
    if found["shapes"] == trained_on["shapes"]:
        difference = tr("has the same shapes but other weights")
    else:
        difference = tr("has tensors of other names or shapes")
    raise UserError(
        tr(
            "this is not the base of the adapter {adapter}: it was trained on {name}, and this "
            "one {difference}.",
            adapter=adapter,
            name=name,
            difference=difference,
        ),
        hint=tr("use {name}, or add --force to merge anyway (the shapes must agree).", name=name),
        where=Where(str(base.path)),
    )
