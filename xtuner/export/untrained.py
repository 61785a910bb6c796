"""The base's tensors that training does not build, such as those of multi-token prediction.

The base's ``config.json`` still declares them, and programs that serve the model read them: they
are written with it. transformers lists them in ``_keys_to_ignore_on_load_unexpected``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from xtuner.export.model_folder import find_model, read_json
from xtuner.export.weights import SAFETENSORS, TensorInfo, Weights, shown
from xtuner.utils.hub import INDEX_SUFFIX, read_weight_map
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXTRA = "model-untrained.safetensors"
"""The file that they are added in."""


class Untrained(NamedTuple):
    """Tensors of a base that a written model does not have.

    Attributes:
        weights: the base's.
        copied: which its class knows nothing of; to be written with the model.
        parts: names, of parts that only the class of the base has: of a visual encoder where
            the class of the language model was trained.
    """

    weights: Weights
    copied: list[TensorInfo]
    parts: list[str]

    def report(self) -> None:
        """Say what is copied, and what the written model lacks."""
        if self.copied:
            names = shown((info.name for info in self.copied), 3)
            print(tr("copied from the base, as training does not build them: {names}", names=names))
        if self.parts:
            print(
                tr(
                    "not written, as the class of the language model does not have them: "
                    "{count} tensors of the base ({names}).",
                    count=len(self.parts),
                    names=shown(self.parts, 3),
                )
            )


def find_untrained(base: Path, model: PreTrainedModel, written: set[str]) -> Untrained:
    """Find what a base has, and a model that was trained from it does not build.

    Args:
        base: its folder.
        model: of any device.
        written: the names of its tensors in files, and of those that are tied to others.
    """
    weights = Weights(base)
    missing = [info for name, info in weights.infos.items() if name not in written]
    if len(written - set(weights.infos)) <= 1:  # both name tensors alike; a head may be tied
        return Untrained(weights, missing, [])
    unknown = _ignored(missing, type(model))
    whole = _class_of(base)
    copied = unknown if whole is None else _ignored(unknown, whole)
    names = {info.name for info in copied}
    return Untrained(weights, copied, [info.name for info in unknown if info.name not in names])


def complete_from_base(folder: Path, llm: object) -> None:
    """Add what its base has to the folder of a whole language model; nothing to other folders.

    Args:
        folder: as ``save_pretrained`` has written it.
        llm: the model, which names its base.
    """
    from transformers import PreTrainedModel

    whole = isinstance(llm, PreTrainedModel) and class_name(folder) == type(llm).__name__
    if isinstance(llm, PreTrainedModel) and whole and llm.name_or_path:
        add_untrained(folder, find_model(str(llm.name_or_path)), llm)


def add_untrained(folder: Path, base: Path, model: PreTrainedModel) -> None:
    """Add what a base has to a folder that ``save_pretrained`` has written.

    Args:
        folder: with safetensors, whose dtype the tensors get.
        base: the base's folder.
        model: what was written.
    """
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    own = Weights(folder)
    found = find_untrained(base, model, set(own.infos) | tied)
    found.report()
    if not found.copied:
        return
    from safetensors.torch import save_file

    dtype = next(info.dtype for info in own.infos.values() if info.dtype.is_floating_point)
    tensors = {
        info.name: found.weights.read(info.name).to(_dtype(info, dtype)) for info in found.copied
    }
    save_file(tensors, folder / EXTRA, metadata={"format": "pt"})
    _add_to_index(folder, own, tensors)


def _add_to_index(folder: Path, own: Weights, tensors: dict[str, torch.Tensor]) -> None:
    file = folder / f"{SAFETENSORS}{INDEX_SUFFIX}"
    if file.is_file():
        places = read_weight_map(file)
    else:  # a single file would be read without the other
        single = folder / SAFETENSORS
        renamed = single.rename(folder / "model-trained.safetensors")
        places = dict.fromkeys(own.infos, renamed.name)
    places |= dict.fromkeys(tensors, EXTRA)
    size = own.nbytes + sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    file.write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def class_name(folder: Path) -> str:
    """The class that a model folder's ``config.json`` names; empty if there is none."""
    file = folder / "config.json"
    names = (read_json(file) if file.is_file() else {}).get("architectures") or [""]
    return str(names[0])


def _class_of(base: Path) -> type | None:
    """The class of transformers that a folder names; None for one of its own."""
    import transformers

    found = getattr(transformers, class_name(base), None)
    return found if isinstance(found, type) else None


def _dtype(info: TensorInfo, dtype: torch.dtype) -> torch.dtype:
    return dtype if info.dtype.is_floating_point else info.dtype


def _ignored(infos: list[TensorInfo], kind: type) -> list[TensorInfo]:
    """Those whose names a class of transformers says it ignores."""
    patterns = getattr(kind, "_keys_to_ignore_on_load_unexpected", None) or []
    return [info for info in infos if any(re.search(pattern, info.name) for pattern in patterns)]
