"""All 578 published configs load, name things that exist, call them right, and take overrides.

The files are data, fetched by pip into a temporary folder; nothing else of that wheel is unpacked.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from xtuner import configs
from xtuner.config.check import Problem, check
from xtuner.config.check.calls import OPTIONAL_PACKAGES
from xtuner.config.compat import adapt_published
from xtuner.config.load import load
from xtuner.config.override import load_config, override
from xtuner.config.values import own_values

COUNT = 578
SETTINGS = {
    "lr": 1.25e-5,
    "batch_size": 7,
    "max_length": 1100,
    "accumulative_counts": 5,
    "max_epochs": 11,
}


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The published config files, without the conversion scripts that lay beside them."""
    folder = tmp_path_factory.mktemp("published")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--ignore-requires-python"]
    command += ["--quiet", "--disable-pip-version-check", "-d", str(folder), "xtuner==0.1.23"]
    got = subprocess.run(command, capture_output=True, text=True, timeout=240)
    if got.returncode:
        pytest.skip(f"no published configs: pip download failed: {got.stderr.strip()[-200:]}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        names = [n for n in wheel.namelist() if n.startswith("xtuner/configs/")]
        wheel.extractall(folder, [n for n in names if n.endswith(".py")])
    files = sorted((folder / "xtuner" / "configs").rglob("*.py"))
    scripts = [file for file in files if "if __name__ ==" in file.read_text("utf-8")]
    return [file for file in files if file.name != "__init__.py" and file not in scripts]


def test_all_are_there_and_load(published):
    assert len(published) == COUNT
    for file in published:
        assert own_values(load_config(file))["model"] is not None


@pytest.fixture(scope="session")
def problems(published: list[Path]) -> list[Problem]:
    return [problem for file in published for problem in check(file)]


def test_every_name_exists_and_every_call_fits(problems):
    wrong = [
        problem
        for problem in problems
        if problem.code.startswith(("XT00", "XT01", "XT02")) and problem.severity == "error"
    ]
    assert not wrong, "\n".join(sorted({problem.message for problem in wrong}))


def test_only_listed_packages_are_optional(problems):
    absent = {problem.message for problem in problems if problem.code == "XT0107"}
    assert all(any(name in message for name in OPTIONAL_PACKAGES) for message in absent)


def test_published_spellings_are_adapted(published):
    for file in published:
        cfg = load_config(file)
        adapt_published(cfg)
        text = str(own_values(cfg))
        assert "torch_dtype" not in text and "ignore_verifications" not in text, file


def overridden(name: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a config that it has, and the config with all of them overridden."""
    document = load(name)
    plain = document.values
    words = [f"{key}={value}" for key, value in SETTINGS.items() if key in plain]
    return plain, override(document, words).values


def lengths(value: Any) -> Iterator[Any]:
    """The ``max_length`` of the datasets in a dataloader."""
    if isinstance(value, dict):
        for key in dict.keys(value):
            inner = dict.__getitem__(value, key)
            if key == "max_length":
                yield inner
            else:
                yield from lengths(inner)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from lengths(item)


def unreached(name: str | Path) -> list[str]:
    """The overrides that did not arrive where training takes them from."""
    plain, values = overridden(name)
    if plain.get("framework") == "huggingface":
        wanted = SETTINGS["max_length"]
        return [] if set(lengths(values["train_dataset"])) == {wanted} else ["max_length"]
    parallel = plain.get("sequence_parallel_size", 1)
    loader, wrapper = values["train_dataloader"], values["optim_wrapper"]
    arrived = {
        "lr": wrapper["optimizer"]["lr"] == SETTINGS["lr"],
        "batch_size": _batch_size(loader) == SETTINGS["batch_size"],
        "max_length": set(lengths(loader)) <= {SETTINGS["max_length"]},
        "accumulative_counts": wrapper["accumulative_counts"]
        in (SETTINGS["accumulative_counts"], SETTINGS["accumulative_counts"] * parallel),
        "max_epochs": dict.get(values["train_cfg"], "max_epochs")
        in (SETTINGS["max_epochs"], None if dict.get(values["train_cfg"], "max_iters") else 0),
    }
    return [key for key, there in arrived.items() if not there]


def _batch_size(loader: dict[str, Any]) -> Any:
    inner = dict.get(loader, "batch_sampler") or {}
    return dict.get(loader, "batch_size") or dict.get(inner, "batch_size")


def test_overrides_reach_in_published(published):
    wrong = {str(file): keys for file in published if (keys := unreached(file))}
    assert not wrong


def test_overrides_reach_in_ours():
    wrong = {name: keys for name in configs.names() if (keys := unreached(name))}
    assert not wrong
