"""Cores are shared between processes, and freed memory stays with the process."""

import os
import subprocess
import sys

import pytest

from xtuner.utils import cpu
from xtuner.utils.cpu import (
    bound_known_products,
    keep_freed_memory,
    pad_to_bucket,
    threads_each,
    usable_cores,
)

# Ten tensors of 8 MiB at once, freed again: each page that the system gives anew is a fault.
FAULTS = """
import resource, sys, torch
from xtuner.utils.cpu import keep_freed_memory
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


# Memory that products of ever other shapes leave behind, in MiB.
PRODUCTS = """
import sys, psutil, torch
from xtuner.utils.cpu import bound_known_products
if sys.argv[1] == "bound":
    bound_known_products()
def multiply(sizes):
    for size in sizes:
        torch.ones(size, 64, dtype=torch.bfloat16) @ torch.ones(64, 64, dtype=torch.bfloat16)
multiply(range(65, 70))
before = psutil.Process().memory_info().rss
multiply(range(100, 1100))
print((psutil.Process().memory_info().rss - before) / 2**20)
"""

# Tensors between others that stay: what is freed is held in gaps until it is given back.
GAPS = """
import psutil, torch
from xtuner.utils.cpu import SETTLING, HeapTrimmer, keep_freed_memory
keep_freed_memory()
heap, held = HeapTrimmer(), []
resident = lambda: psutil.Process().memory_info().rss
def step(leaves_gaps=False):
    tensors = [torch.ones(2**18) for _ in range(700)]
    if leaves_gaps:
        held.extend(tensors[::10])
def left():
    step(leaves_gaps=True)
    full = resident()
    return full, heap.after_step(0.0), full - resident()
full, trimmed, returned = left()
assert trimmed and returned > 500 * 2**20  # what loading left
for now in range(SETTLING):
    step()
    assert not heap.after_step(100.0 + now)
full = resident()
for now in range(20):  # the same memory again and again is what steps need
    step()
    assert not heap.after_step(200.0 + now) and resident() > full - 2**20
held.append([torch.ones(2**18) for _ in range(2000)][::10])  # a process that has grown
full = resident()
assert not heap.after_step(14.0)
assert heap.after_step(15.0) and resident() < full - 500 * 2**20
"""


# What glibc begins with; by itself it raises these as it goes, now more and now less.
GLIBC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def run(code, *words, **more):
    environment = {
        name: value
        for name, value in os.environ.items()
        if "MALLOC" not in name and "ONEDNN" not in name
    } | more
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_cores_are_shared():
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
    assert threads_each(1) == usable_cores()
    assert threads_each(10_000) == 1


@pytest.mark.slow
@pytest.mark.skipif(not keep_freed_memory(), reason="the C library is not glibc")
def test_freed_memory_is_kept():
    faults = {way: int(run(FAULTS, way, **GLIBC)) for way in ("kept", "given back")}
    assert 4 * faults["kept"] < faults["given back"]


@pytest.mark.skipif(not keep_freed_memory(), reason="the C library is not glibc")
def test_memory_in_gaps_is_given_back():
    run(GAPS)


@pytest.mark.slow
def test_what_is_remembered_of_products_is_bounded(monkeypatch):
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")  # the user's own
    bound_known_products()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"
    free = float(run(PRODUCTS, "free"))
    if free < 50:
        pytest.skip("this processor's products leave nothing behind")
    assert float(run(PRODUCTS, "bound")) < 0.9 * free


def test_few_numbers_of_rows_are_left_and_none_is_much_larger():
    made_up = [pad_to_bucket(rows) for rows in range(5000)]
    assert made_up[:32] == list(range(32))
    assert all(rows <= made <= rows * 17 / 16 for rows, made in enumerate(made_up))
    assert len(set(made_up[2048:4097])) == 17
    assert [pad_to_bucket(made) for made in made_up] == made_up


@pytest.mark.parametrize(
    ("load", "given", "policy"),
    [(0.9, {}, None), (1.1, {}, "PASSIVE"), (9.0, {"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")],
)
def test_threads_sleep_where_the_machine_has_other_work(load, given, policy, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert cpu.sleep_on_busy_machines() == (policy == "PASSIVE")
    assert os.environ.get("OMP_WAIT_POLICY") == policy
    os.environ.pop("OMP_WAIT_POLICY", None)
