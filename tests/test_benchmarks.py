"""What the benchmarks for other machines do can be tried out on this one."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.forked import run

GPU = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_on_a_tiny_model(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(GPU.parent))
    gpu = importlib.import_module("gpu")

    def run_case(case):
        words = ["--shapes", case.shape, "--device", case.device, "--methods", case.method]
        done = run(GPU, *words, "--lengths", str(case.length), "--folder", tmp_path / case.method)
        return json.loads(done.stdout.splitlines()[-1])

    monkeypatch.setattr(gpu, "run", run_case)
    words = ["--shapes", "tiny", "--device", "cpu", "--lengths", "48", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words])
    assert gpu.main() == 0
    result = json.loads((tmp_path / "gpu.json").read_text("utf-8"))
    assert [case["method"] for case in result["cases"]] == ["full", "lora", "qlora"]
    for case in result["cases"]:
        assert "failed" not in case, case["failed"]
        # No upper bound: where the processor only emulates bf16, parts that are not in bf16 pay.
        assert case["tokens_per_second"] > 0 and case["share_of_matmul"] > 0
        assert 5.5 < case["loss"] < 7  # log(512) = 6.2: nothing can be learnt from these rows
    table = (tmp_path / "gpu.md").read_text("utf-8")
    assert "| tiny | qlora | 48 |" in table and torch.__version__ in table


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_it_needs():
    done = run(GPU, status=2)
    assert "needs a GPU" in done.stderr and "Traceback" not in done.stderr


def test_a_case_that_fails_says_why(tmp_path):
    words = ["--shapes", "tiny", "--device", "cpu", "--lengths", "-1", "--methods", "full"]
    words += ["--results", str(tmp_path)]
    run(GPU, *words)
    (case,) = json.loads((tmp_path / "gpu.json").read_text("utf-8"))["cases"]
    assert "Error" in case["failed"]


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(str(GPU.parent))
    return importlib.import_module("peers")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise ValueError('no such thing')", "ValueError: no such thing"),
        ("import sys; print('ERROR: no matching version', file=sys.stderr); sys.exit(1)", "ERROR"),
        ("import sys; sys.exit(3)", "status 3"),
        ("import time; time.sleep(500)", "not done after"),
    ],
)
def test_a_peer_that_fails_says_why(peers, monkeypatch, tmp_path, code, said):
    driver = tmp_path / "driver.py"
    driver.write_text(code)
    monkeypatch.setitem(peers.PEERS, "other", peers.Peer("", str(driver)))
    monkeypatch.setattr(peers, "python_of", lambda name, home: Path(sys.executable))
    if "sleep" in code:
        monkeypatch.setattr(peers, "MINUTES_TO_RUN", 0.01)
    (tmp_path / "packs.json").write_text("[]")
    found = peers.run("other", tmp_path, peers.measuring.SHAPES["llama_34m"], "full")
    assert list(found) == ["failed"] and said in found["failed"]


def test_a_peer_that_failed_stands_beside_the_others(peers):
    facts = {"tokens_per_second": 4.0, "peak_mib": 2.0, "loss": 1.0}
    slow = facts | {"tokens_per_second": 2.0, "precision": "float32"}
    sides = {"ours": [facts, facts], "trl": [slow, slow], "other": [facts, {"failed": "why"}]}
    found = peers.measuring.compared(sides)
    assert found["other"] == {"failed": "why"}
    assert found["trl"] == slow and found["speed_of_ours_to_trl"] == 2.0
    assert "speed_of_ours_to_other" not in found


@pytest.fixture
def soak(monkeypatch):
    monkeypatch.syspath_prepend(str(GPU.parent))
    return importlib.import_module("soak")


def soaked(soak, **growing):
    """A long run of 100 steps; what is named grows by so much with each step."""
    kept = dict(memory_mib=400.0, open_files=8, files=14, log_bytes=0, cpu_seconds=0.0)
    samples = [
        soak.Sample(
            iterations=step,
            **{
                name: value
                + step * growing.get(name, {"log_bytes": 290, "cpu_seconds": 0.04}.get(name, 0))
                for name, value in kept.items()
            },
        )
        for step in range(1, 101)
    ]
    costs = {"cpu_seconds_to_first_step": 3.0, "cpu_seconds_per_step": 0.04}
    return {"tenths": soak.in_tenths(samples, 100), "resumed": {"early": costs, "late": costs}}


def test_a_soak_finds_what_grows(soak):
    steady = soaked(soak)
    assert len(steady["tenths"]) == 10 and soak.grown(steady) == []
    for name, growth in (("memory_mib", 1.0), ("open_files", 1), ("files", 1)):
        (found,) = soak.grown(soaked(soak, **{name: growth}))
        assert found.startswith(name)
    steady["resumed"]["late"] = {"cpu_seconds_to_first_step": 9.0, "cpu_seconds_per_step": 0.09}
    assert len(soak.grown(steady)) == 2


def test_a_soak_goes_on_with_the_next_part_and_reports_what_was_lost(soak, monkeypatch, tmp_path):
    done = []

    def killed(training, folder, kills):
        done.append(folder.name)
        wrong = ["disturbed_0: .optimizer"] if folder.name == "dpo" else []
        return {"kills": kills, "while_saving": 0, "finished": 1, "wrong": wrong}

    for name, replacement in {
        "killed": killed,
        "long_run": lambda base, folder, steps: soaked(soak) | {"steps": steps, "wrong": []},
        "warm_up": lambda: None,
        "prepare": lambda folder: None,
    }.items():
        monkeypatch.setattr(soak, name, replacement)
    words = ["--folder", str(tmp_path), "--dry", "--only"]
    assert soak.main([*words, "long", "full"]) == 0
    assert soak.main([*words, "full", "dpo"]) == 1
    assert done == ["full", "dpo"]
    report = (tmp_path / "soak.md").read_text("utf-8")
    assert "| full | 1 | 0 | 1 | 0 |" in report and "* dpo: disturbed_0: .optimizer" in report
    assert "| 100 | 400 | 8 | 14 | 290 | 0.04 |" in report
    assert "Not run: lora; qlora; images; " in report
