"""Cores are shared between processes, and freed memory stays with the process."""

import os
import subprocess
import sys

import pytest

from xtuner.utils.processor import keep_freed_memory, threads_each, usable_cores

# Ten tensors of 8 MiB at once, freed again: each page that the system gives anew is a fault.
FAULTS = """
import resource, sys, torch
from xtuner.utils.processor import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def step():
    held = [torch.ones(2 * 2**20) for _ in range(10)]
step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_cores_are_shared():
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
    assert threads_each(1) == usable_cores()
    assert threads_each(10_000) == 1


@pytest.mark.skipif(not keep_freed_memory(), reason="the C library is not glibc")
def test_freed_memory_is_kept():
    environment = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    faults = {
        way: int(
            subprocess.run(
                [sys.executable, "-c", FAULTS, way],
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for way in ("kept", "given back")
    }
    assert faults["kept"] < 2048 < faults["given back"]  # a tensor has 2,048 pages
