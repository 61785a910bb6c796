"""What the benchmarks for other machines do can be tried out on this one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

GPU = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_on_a_tiny_model(tmp_path):
    words = ["--shapes", "tiny", "--device", "cpu", "--lengths", "48", "--results", str(tmp_path)]
    done = subprocess.run([sys.executable, GPU, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "gpu.json").read_text("utf-8"))
    assert [case["method"] for case in result["cases"]] == ["full", "lora", "qlora"]
    for case in result["cases"]:
        assert "failed" not in case, case["failed"]
        assert case["tokens_per_second"] > 0 and 0 < case["share_of_matmul"] < 1
        assert 5.5 < case["loss"] < 7  # log(512) = 6.2: nothing can be learnt from these rows
    table = (tmp_path / "gpu.md").read_text("utf-8")
    assert "| tiny | qlora | 48 |" in table and torch.__version__ in table


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_it_needs():
    done = subprocess.run([sys.executable, GPU], capture_output=True, text=True)
    assert done.returncode == 2
    assert "needs a GPU" in done.stderr and "Traceback" not in done.stderr


def test_a_case_that_fails_says_why(tmp_path):
    words = ["--shapes", "tiny", "--device", "cpu", "--lengths", "-1", "--methods", "full"]
    words += ["--results", str(tmp_path)]
    done = subprocess.run([sys.executable, GPU, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (case,) = json.loads((tmp_path / "gpu.json").read_text("utf-8"))["cases"]
    assert "Error" in case["failed"]
