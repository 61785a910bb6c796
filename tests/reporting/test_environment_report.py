"""What xtuner doctor says of the machine: versions, devices, memory, disk and caches."""

from __future__ import annotations

import importlib.metadata
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement

from xtuner.reporting import environment_report as report
from xtuner.reporting.environment_report import GIB, MISSING, OK, WARNING


@pytest.fixture
def installed(monkeypatch):
    """Set what XTuner needs, what was tested and what is installed."""

    def install(needs: str, versions: dict[str, str], tested: dict[str, str] | None = None) -> None:
        def version(name: str) -> str:
            if name not in versions:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(report, "requirements", lambda: [Requirement(needs)])
        monkeypatch.setattr(report, "tested_versions", lambda: tested or {})
        monkeypatch.setattr(importlib.metadata, "version", version)

    return install


def test_a_supported_package(installed):
    installed("torch>=2.7,<3", {"torch": "2.13.0+cpu"}, {"torch": "2.13.0"})
    (item,) = report.package_items()
    assert (item.status, item.name, item.found) == (OK, "torch", "2.13.0+cpu")


def test_the_tested_version_is_named_where_another_is_installed(installed):
    installed("torch>=2.7,<3", {"torch": "2.12.0"}, {"torch": "2.13.0"})
    (item,) = report.package_items()
    assert (item.status, item.found) == (OK, "2.12.0; tested with 2.13.0")


@pytest.mark.parametrize("version", ["2.6.1", "3.0.0"])
def test_a_version_out_of_bounds(version, installed):
    installed("torch>=2.7,<3", {"torch": version})
    (item,) = report.package_items()
    assert item.status == WARNING
    assert item.found == f"{version}; supported: <3,>=2.7"
    assert item.advice == "pip install 'torch<3,>=2.7'"


def test_a_needed_package_that_is_not_installed(installed):
    installed("pyarrow", {})
    (item,) = report.package_items()
    assert (item.status, item.name, item.advice) == (MISSING, "pyarrow", "pip install 'pyarrow'")


def test_an_optional_package_is_not_needed(installed):
    installed("bitsandbytes>=0.48; extra == 'quant'", {})
    (item,) = report.package_items()
    assert item.status == OK
    assert "pip install 'bitsandbytes>=0.48'" in item.found
    installed("pandas; extra == 'eval'", {})
    assert not list(report.package_items())


def test_without_the_distribution_nothing_is_known_of_bounds(monkeypatch):
    monkeypatch.setattr(report, "DISTRIBUTION", "no-such-distribution")
    (item,) = report.package_items()
    assert (item.status, item.advice) == (WARNING, "pip install -e .")
    assert report.python_item().status == OK


def test_the_packages_of_this_environment_are_listed():
    names = {item.name for item in report.package_items()}
    assert set(report.SHOWN) <= names


def test_tested_versions_are_those_of_the_file(tmp_path):
    file = tmp_path / "tested.txt"
    file.write_text('# comment\ntorch==2.13.0\nnumpy==2.4.6 ; python_version >= "3.11"\n')
    assert report.tested_versions(file) == {"torch": "2.13.0", "numpy": "2.4.6"}
    assert report.tested_versions(tmp_path / "none.txt") == {}
    assert "torch" in report.tested_versions()


def test_an_unsupported_python(monkeypatch):
    monkeypatch.setattr(report.platform, "python_version", lambda: "3.8.1")
    item = report.python_item()
    assert item.status == WARNING
    assert item.found.startswith("3.8.1; supported: ")


def test_a_gpu(monkeypatch):
    device = SimpleNamespace(name="NVIDIA H100", total_memory=80 * GIB, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: device)
    (item,) = report.device_items()
    assert (item.status, item.name) == (OK, "cuda:0")
    assert item.found == "NVIDIA H100, 80 GiB, compute capability 9.0"


def test_a_driver_without_a_gpu_for_torch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(report.shutil, "which", lambda name: f"/usr/bin/{name}")
    warning, device = report.device_items()
    assert (warning.status, device.name) == (WARNING, "device")
    assert torch.__version__ in warning.found


def test_a_torch_that_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (item,) = report.device_items()
    assert (item.status, item.name) == (MISSING, "torch")


def test_memory(monkeypatch):
    assert report.memory_item().found.endswith("GiB free")
    monkeypatch.setattr(report, "FEW_MEMORY", 2**60)
    assert report.memory_item().status == WARNING


@pytest.mark.parametrize(("free", "status"), [(19, WARNING), (21, OK)])
def test_disk_of_a_folder_that_is_not_there_yet(free, status, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    asked: list[Path] = []
    monkeypatch.setattr(
        report.shutil, "disk_usage", lambda place: asked.append(place) or usage(free * GIB)
    )
    item = report.disk_item("work dir", tmp_path / "a" / "b")
    assert (item.status, asked) == (status, [tmp_path])
    assert item.found == f"{free} GiB free in {tmp_path / 'a' / 'b'}"
    assert bool(item.advice) == (status == WARNING)


def test_the_size_of_a_cache(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "weights").write_bytes(b"")
    with (tmp_path / "sub" / "weights").open("r+b") as file:
        file.truncate(GIB)  # sparse
    (tmp_path / "link").symlink_to(tmp_path / "sub" / "weights")
    assert report.cache_item("cache", tmp_path).found.startswith("1.0 GiB; ")
    monkeypatch.setattr(report, "SECONDS_OF_A_CACHE", -1.0)
    assert report.cache_item("cache", tmp_path).found.startswith("more than ")


def test_the_caches_are_those_that_are_used(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "data"))
    monkeypatch.setenv("XTUNER_CACHE", str(tmp_path / "prepared"))
    folders = list(report.caches().values())
    assert tmp_path / "data" in folders
    assert tmp_path / "prepared" / "datasets" in folders
