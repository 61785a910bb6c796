"""The allocator's settings are ours unless the environment has some."""

import os

import pytest
import torch

from xtuner.utils.gpu import ALLOCATOR_VARIABLES, use_expandable_segments


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ALLOCATOR_VARIABLES:
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    "version, name",
    [
        ("2.8.0", "PYTORCH_CUDA_ALLOC_CONF"),
        ("2.9.0", "PYTORCH_ALLOC_CONF"),
        ("2.13.0+cpu", "PYTORCH_ALLOC_CONF"),
    ],
)
def test_segments_grow(version, name, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    use_expandable_segments()
    found = {each: os.environ.get(each) for each in ALLOCATOR_VARIABLES}
    assert found.pop(name) == "expandable_segments:True"
    assert list(found.values()) == [None]


@pytest.mark.parametrize("name", ALLOCATOR_VARIABLES)
def test_settings_of_the_environment_stay(name, monkeypatch):
    monkeypatch.setenv(name, "max_split_size_mb:128")
    use_expandable_segments()
    found = {each: os.environ[each] for each in ALLOCATOR_VARIABLES if each in os.environ}
    assert found == {name: "max_split_size_mb:128"}
