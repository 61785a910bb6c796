"""Two steps of each method on fake CUDA tensors: nothing fails, and little is asked of the GPU.

Runs where a CUDA build of torch is installed, with or without a GPU:

    pip install --index-url https://download.pytorch.org/whl/cu130 torch && pytest tests/fake_cuda
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from tests.fake_cuda.cases import Case, Found
from tests.helpers.forked import LIMIT, ROOT

pytestmark = [
    pytest.mark.skipif(
        torch.version.cuda is None, reason="needs a CUDA build of torch (no GPU): see the file"
    ),
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler, cc"),
]
HERE = Path(__file__).parent
METHODS = ("full", "lora", "qlora")
WAITS, WAITS_OF_IMAGES = 3, 17
"""Most waits of an optimizer step; transformers' visual encoders ask for the sizes of images, once
for all layers."""
LAYERS = 12
CASES = {
    **{
        f"{method}, {rows}": Case(method=method, rows=rows)
        for method in METHODS
        for rows in ("packed", "padded")
    },
    **{
        f"flash-attn {state}, {rows}": Case("lora", rows, flash_attn=state)
        for state in ("present", "broken")
        for rows in ("packed", "padded")
    },
    **{
        f"{major}.{minor}, {method}": Case(method, capability=(major, minor))
        for major, minor in ((7, 5), (8, 0), (12, 0))
        for method in METHODS
    },
    **{
        f"{task}, {rows}": Case(method, rows, task)
        for task, method in (("dpo", "lora"), ("reward", "full"), ("llava", "lora"))
        for rows in ("packed", "padded")
    },
    "lora with dropout": Case("lora", dropout=0.1),
    "lora, offload": Case("lora", offload=True),
}
OF_BITSANDBYTES = {
    f"{optimizer}, {method}": Case(
        method, shape="llama2_7b", rank=64, optimizer=optimizer, tokens=128
    )
    for optimizer, methods in {
        "AdamW8bit": ("lora", "qlora"),
        "PagedAdamW8bit": METHODS,
        "PagedAdamW32bit": ("full", "qlora"),
    }.items()
    for method in methods
}
OF_IMAGES = {
    f"{kind}, {rows}": Case("lora", rows, kind)
    for kind in ("qwen2_5_vl", "qwen3_vl", "gemma3", "internvl")
    for rows in ("packed", "padded")
}
LARGE = {
    "loss of 8,192 rows": Case("lora", task="loss", shape="qwen2_5_7b", tokens=8192),
    "7B QLoRA": Case("qlora", shape="llama2_7b", layers=32, tokens=2048, rank=64, dropout=0.1),
    "0.5B LoRA": Case("lora", shape="qwen2_5_0_5b", layers=24, tokens=512),
    "7B LoRA": Case("lora", shape="qwen2_5_7b", layers=LAYERS, tokens=8192),
    "7B LoRA, offload": Case("lora", shape="qwen2_5_7b", layers=LAYERS, tokens=8192, offload=True),
}


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with a runtime to preload and a driver to link to."""
    folder = tmp_path_factory.mktemp("libraries")
    site = Path(sysconfig.get_paths()["purelib"])
    headers = [next((site / "nvidia").rglob("cuda_runtime_api.h")).parent]
    headers += [site / "triton" / "backends" / "nvidia" / "include"]
    includes = [f"-I{header}" for header in headers]
    for source, library in (("runtime.c", "runtime.so"), ("driver.c", "libcuda.so.1")):
        words = ["cc", "-shared", "-fPIC", *includes, "-o", folder / library, HERE / source]
        subprocess.run(words, check=True, timeout=LIMIT)
    return folder


def found_in(cases: dict[str, Case], libraries: Path, folder: Path) -> dict[str, Found]:
    """Train the cases in one process of its own."""
    given, answer = folder / "cases.json", folder / "found.json"
    given.write_text(json.dumps([dataclasses.asdict(case) for case in cases.values()]), "utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "tests.fake_cuda.worker", given, answer],
        cwd=ROOT,
        env={
            **os.environ,
            "LD_PRELOAD": str(libraries / "runtime.so"),
            "LD_LIBRARY_PATH": str(libraries),
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [Found(**fields) for fields in json.loads(answer.read_text("utf-8"))]
    print(done.stderr[-20000:])
    return dict(zip(cases, found, strict=True))


@pytest.fixture(scope="module")
def steps(libraries: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    return found_in(
        CASES | OF_BITSANDBYTES | OF_IMAGES, libraries, tmp_path_factory.mktemp("steps")
    )


@pytest.mark.parametrize("name", CASES)
def test_a_step_fails_nowhere_and_waits_little(name, steps):
    found = steps[name]
    assert not found.error
    assert sum(found.waits.values()) <= WAITS, found.waits
    assert found.launches > 0 and found.peak_gib > found.weights_gib > 0


@pytest.mark.parametrize("name", OF_BITSANDBYTES)
def test_states_in_8_bits_and_pages_are_stepped_and_resumed(name, steps):
    """What cannot be seen here: the kernels themselves, and when pages move."""
    found = steps[name]
    assert not found.error
    assert sum(found.waits.values()) <= WAITS, found.waits
    assert set(found.states) <= {"gpu", "paged"}
    assert ("paged" in found.states) == name.startswith("Paged")


@pytest.mark.parametrize("name", OF_IMAGES)
def test_a_step_with_images_fails_nowhere(name, steps):
    found = steps[name]
    assert not found.error
    assert sum(found.waits.values()) <= WAITS_OF_IMAGES, found.waits


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("lora, packed", "torch varlen"),
        ("flash-attn present, packed", "flash-attn"),
        ("flash-attn broken, packed", "torch varlen"),
        ("7.5, lora", "torch sdpa, sample by sample"),
    ],
)
def test_the_kernel_is_that_of_the_card_and_the_libraries(name, backend, steps):
    assert steps[name].attention == backend


@pytest.fixture(scope="module")
def large(libraries: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    return found_in(LARGE, libraries, tmp_path_factory.mktemp("large"))


def test_the_loss_of_a_large_vocabulary_is_few_launches_and_little_traffic(large):
    """152,064 words, 8,192 rows: at most 400 launches, 90 GB, 1.5 GiB."""
    found = large["loss of 8,192 rows"]
    assert not found.error
    assert not found.waits
    assert found.launches < 400 and found.gigabytes < 90 and found.peak_gib < 1.5


def test_7b_qlora_fits_8_gib(large):
    """Llama-2-7B with the catalogue's rank and dropout, 2,048 tokens."""
    found = large["7B QLoRA"]
    assert not found.error
    assert found.peak_gib < 8


def test_inputs_of_layers_leave_the_gpu(large):
    """All but those of three layers: the one that is computed, and one before and after it."""
    kept, offloaded = large["7B LoRA"], large["7B LoRA, offload"]
    assert not kept.error and not offloaded.error
    assert sum(offloaded.waits.values()) <= WAITS, offloaded.waits
    of_a_layer = 8192 * 3584 * 2 / 2**30
    assert kept.peak_gib - offloaded.peak_gib > (LAYERS - 3) * of_a_layer
