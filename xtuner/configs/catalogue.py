"""The catalogue: all names, the text of each, what it trains, and files on demand."""

from __future__ import annotations

import ast
import functools
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from xtuner.configs import internvl, llava
from xtuner.configs.datasets import DATASETS
from xtuner.configs.models import MODELS
from xtuner.configs.names import ConfigName, parse
from xtuner.configs.render import render_config, values_of
from xtuner.configs.unknown import UnknownConfig, nearest

ONEOFFS = Path(__file__).parent / "oneoffs"
DEEPSPEED = Path(__file__).parent / "deepspeed"


@functools.cache
def _oneoffs() -> dict[str, Path]:
    return {path.stem: path for path in sorted(ONEOFFS.glob("*.py"))}


@functools.cache
def _curated() -> tuple[str, ...]:
    composed = [f"{card.name}_{recipe}" for card in MODELS.values() for recipe in card.recipes]
    return tuple(sorted({*composed, *llava.names(), *internvl.names(), *_oneoffs()}))


def names() -> list[str]:
    """The curated names, sorted. More names than these resolve: any sensible combination does."""
    return list(_curated())


def render(name: str) -> str:
    """The text of the config with this name.

    Raises:
        UnknownConfig: when there is none; it has a ``reason`` and ``suggestions``.
    """
    if name in _oneoffs():
        return _oneoffs()[name].read_text("utf-8")
    family = _family(name)
    if family:
        return family.render(name, _curated())
    return render_config(parse(name, _curated()))


def _family(name: str) -> ModuleType | None:
    """The module of a family with a grammar of its own, or None."""
    if any(name.startswith(f"{model}_") for model in MODELS):  # llava_onevision_7b
        return None
    families = {"llava": llava, "internvl": internvl}
    return families.get(name.partition("_")[0])


def describe(name: str) -> dict[str, Any]:
    """What a name trains: ``name``, ``model``, ``path``, ``billions``, ``method``, ``dataset``.

    ``billions`` (of parameters) is None where the catalogue does not know it.

    Raises:
        UnknownConfig: when there is no such config.
    """
    if name in _oneoffs():
        return _describe_file(name)
    family = _family(name)
    if family:
        return family.describe(name, _curated())
    parsed: ConfigName = parse(name, _curated())
    return {
        "name": name,
        "model": parsed.model.name,
        "path": values_of(parsed)["pretrained_model_name_or_path"],
        "billions": parsed.model.billions,
        "method": parsed.method_name,
        "dataset": parsed.dataset.name,
    }


def _describe_file(name: str) -> dict[str, Any]:
    """What is known of a file of ``oneoffs`` without running it."""
    paths = {"pretrained_model_name_or_path": "", "llm_name_or_path": "", "path": ""}
    for node in ast.parse(render(name)).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            target = node.targets[0]
            if isinstance(target, ast.Name) and target.id in paths:
                paths[target.id] = str(node.value.value)
    path = next((path for path in paths.values() if path), "")
    card = next((card for card in MODELS.values() if card.path == path), None)
    method = next((word for word in ("qlora", "lora", "full") if word in name.split("_")), "full")
    return {
        "name": name,
        "model": card.name if card else "",
        "path": path,
        "billions": card.billions if card else None,
        "method": method,
        "dataset": max(
            (card for card in DATASETS if f"_{card}_" in f"{name}_"), key=len, default=""
        ),
    }


def deepspeed_path(name: str) -> Path:
    """The file of a DeepSpeed setting, for example of ``deepspeed_zero2_offload``.

    Raises:
        UnknownConfig: when there is none of this name.
    """
    path = DEEPSPEED / f"{name}.json"
    if not path.is_file():
        there = sorted(path.stem for path in DEEPSPEED.glob("*.json"))
        raise UnknownConfig(
            name,
            "DeepSpeed settings are called {names}",
            nearest(name, there),
            names=", ".join(there),
        )
    return path


class _Files(Mapping[str, str]):
    """Curated name -> path of a file with the config, written when the path is asked for."""

    def __getitem__(self, name: str) -> str:
        if name not in _curated():
            raise KeyError(name)
        folder = _cache_folder()
        path = folder / f"{name}.py"
        text = render(name)
        if not path.is_file() or path.read_text("utf-8") != text:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=folder, prefix=f".{name}", delete=False, encoding="utf-8"
            ) as aside:
                aside.write(text)
            Path(aside.name).replace(path)
        return str(path)

    def __iter__(self) -> Iterator[str]:
        return iter(_curated())

    def __len__(self) -> int:
        return len(_curated())


def _cache_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "xtuner" / "configs"


cfgs_name_path: Mapping[str, str] = _Files()
