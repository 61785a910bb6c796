"""What ``xtuner doctor`` says of this machine: Python, packages, devices, memory, disk, caches."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from xtuner.dataset.prepare.cache import cache_folder
from xtuner.utils.lang import N_, tr

OK, WARNING, MISSING = N_("ok"), "warning", N_("missing")
GIB = 2**30
FEW_DISK = 20 * GIB
"""Below this, a checkpoint of a 7B model in full does not fit."""
FEW_MEMORY = 4 * GIB
SECONDS_OF_A_CACHE = 1.0
"""How long the files of one cache are counted."""
TESTED = Path(__file__).parents[2] / "requirements" / "tested.txt"
DISTRIBUTION = "xtuner"
SHOWN = (
    *("torch", "transformers", "peft", "datasets", "mmengine"),
    *("bitsandbytes", "deepspeed", "flash-attn", "liger-kernel"),
)
"""Packages that are always listed; another one only where it is missing or not supported."""


@dataclass(frozen=True)
class Item:
    """One line: ``OK``, ``WARNING`` or ``MISSING``, of what, what was found, and what to do."""

    status: str
    name: str
    found: str
    advice: str = ""


def requirements() -> list[Requirement]:
    """What the installed distribution needs, those of its extras too; empty if not installed."""
    try:
        words = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [Requirement(word) for word in words]


def tested_versions(file: Path = TESTED) -> dict[str, str]:
    """The versions that were tested together; empty outside a checkout."""
    if not file.is_file():
        return {}
    pinned = re.findall(r"^([\w.-]+)==([\w.+-]+)", file.read_text("utf-8"), re.M)
    return dict(pinned)


def python_item() -> Item:
    """Python's version against the supported ones."""
    version = platform.python_version()
    try:
        bounds = importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"] or ""
    except importlib.metadata.PackageNotFoundError:
        bounds = ""
    if SpecifierSet(bounds).contains(version, prereleases=True):
        return Item(OK, "python", version)
    return Item(
        WARNING,
        "python",
        tr("{version}; supported: {bounds}", version=version, bounds=bounds),
        tr("make an environment with a supported Python."),
    )


def package_items() -> Iterator[Item]:
    """The packages that XTuner needs or can use, against their supported and tested versions."""
    known = requirements()
    if not known:
        yield Item(
            WARNING,
            DISTRIBUTION,
            tr("not installed as a package: supported versions are not known"),
            "pip install -e .",
        )
    tested, seen = tested_versions(), set()
    for need in known:
        if need.name in seen or need.name == DISTRIBUTION:
            continue
        seen.add(need.name)
        item = _package(need, tested.get(need.name.lower(), ""))
        optional = need.marker is not None
        if need.name in SHOWN or (item.status != OK and not optional):
            yield item


def _package(need: Requirement, tested: str) -> Item:
    optional = need.marker is not None
    install = f"pip install '{need.name}{need.specifier}'"
    try:
        version = importlib.metadata.version(need.name)
    except importlib.metadata.PackageNotFoundError:
        if optional:
            return Item(OK, need.name, tr("not installed (optional): {install}", install=install))
        return Item(MISSING, need.name, tr("not installed"), install)
    if not need.specifier.contains(version, prereleases=True):
        found = tr("{version}; supported: {bounds}", version=version, bounds=str(need.specifier))
        return Item(WARNING, need.name, found, install)
    if tested and version.partition("+")[0] != tested:
        version = tr("{version}; tested with {tested}", version=version, tested=tested)
    return Item(OK, need.name, version)


def device_items() -> Iterator[Item]:
    """The GPUs with memory and compute capability, or the CPU; what is wrong with torch."""
    try:
        import torch
    except (ImportError, OSError) as error:  # of a library that is not here
        yield Item(
            MISSING, "torch", tr("cannot be imported: {error}", error=error), "pip install torch"
        )
        return

    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        yield Item(
            OK,
            f"cuda:{number}",
            tr(
                "{name}, {memory:.0f} GiB, compute capability {major}.{minor}",
                name=device.name,
                memory=device.total_memory / GIB,
                major=device.major,
                minor=device.minor,
            ),
        )
    if torch.cuda.device_count():
        return
    if shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists():
        yield Item(
            WARNING,
            "gpu",
            tr(
                "there is an NVIDIA driver, but torch {version} sees no GPU",
                version=torch.__version__,
            ),
            tr("install a torch whose CUDA the driver supports; see CUDA_VISIBLE_DEVICES."),
        )
    yield Item(OK, tr("device"), tr("CPU, {cores} cores; no GPU", cores=os.cpu_count()))


def memory_item() -> Item:
    """Free memory of the machine."""
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    sizes = {
        name: int(size.split()[0]) * 1024
        for name, _, size in (line.partition(":") for line in lines)
    }
    total = sizes.get("MemTotal", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    free = sizes.get("MemAvailable", total)
    found = tr("{free:.0f} of {total:.0f} GiB free", free=free / GIB, total=total / GIB)
    if free >= FEW_MEMORY:
        return Item(OK, tr("memory"), found)
    return Item(WARNING, tr("memory"), found, tr("end other programs, or choose a small model."))


def disk_item(name: str, folder: Path) -> Item:
    """Free space where a folder is, or will be."""
    place = folder.expanduser().absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    found = tr("{free:.0f} GiB free in {folder}", free=free / GIB, folder=folder)
    if free >= FEW_DISK:
        return Item(OK, name, found)
    return Item(WARNING, name, found, tr("free some space, or choose a folder on another disk."))


def caches() -> dict[str, Path]:
    """The folders that downloads and prepared data go to, by name."""
    from huggingface_hub import constants

    datasets = os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets"
    return {
        tr("cache of models"): Path(constants.HF_HUB_CACHE),
        tr("cache of datasets"): Path(datasets),
        tr("cache of prepared data"): cache_folder(),
    }


def cache_item(name: str, folder: Path) -> Item:
    """The size of a cache and the free space of its disk."""
    size, whole = _size(folder)
    disk = disk_item(name, folder)
    text = tr("{size:.1f} GiB", size=size / GIB)
    if not whole:
        text = tr("more than {size}", size=text)
    return Item(disk.status, name, tr("{size}; {room}", size=text, room=disk.found), disk.advice)


def _size(folder: Path) -> tuple[int, bool]:
    """The bytes of a folder's files, and whether all were counted in the time for it."""
    size, end = 0, time.monotonic() + SECONDS_OF_A_CACHE
    for root, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):  # deleted meanwhile
                size += (Path(root) / name).lstat().st_size
        if time.monotonic() > end:
            return size, False
    return size, True
