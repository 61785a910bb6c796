"""What the benchmarks for other machines do can be tried out on this one."""

import importlib
import json
import multiprocessing
import os
import signal
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.forked import run

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
GPU_CHECK = BENCHMARKS / "gpu_check.py"


@pytest.mark.slow
def test_the_check_of_a_gpu_runs_dry_on_a_cpu(tmp_path):
    """One check of each kind; ``gpu_check.py --dry`` alone runs all of them."""
    names = ["rates", "loss", "method/qlora", "attention/torch sdpa", "steps"]
    names += [
        "commands/quickstart",
        "qwen2_5_7b/qlora",
        "float16/lora",
        "offload/lora",
        "optimizer",
    ]
    done = run(GPU_CHECK, "--dry", "--results", tmp_path, "--only", *names)
    saved = json.loads((tmp_path / "gpu_check.json").read_text("utf-8"))
    found = {result["name"]: result for result in saved["results"]}
    assert {result["status"] for result in found.values()} <= {"ok", "absent"}
    right = {name for name, result in found.items() if result["status"] == "ok"}
    assert {"rates", "loss", "method/qlora", "steps", "commands/quickstart"} <= right
    assert {"loss/speed", "float16/lora", "offload/lora", "optimizer/AdamW8bit"} <= right
    assert {f"attention/torch sdpa, sample by sample/{n}" for n in ("kernel", "models")} <= right
    assert {f"qwen2_5_7b/qlora/2048/{side}" for side in ("ours", "plain", "plan")} <= right
    loss = found["qwen2_5_7b/qlora/2048/ours"]["facts"]["loss"]
    assert 5.5 < loss < 7  # log(512) = 6.2: nothing can be learnt from random tokens
    text = (tmp_path / "gpu_check.md").read_text("utf-8")
    assert "| qwen2_5_7b | qlora | 2,048 | ours |" in text and torch.__version__ in text
    assert text in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_it_needs():
    done = run(GPU_CHECK, status=2)
    assert "needs a GPU" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def checks(monkeypatch):
    """The modules of ``gpu_checks`` by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("items", "runner", "table", "packages", "tiny", "correctness")
    return SimpleNamespace(
        **{name: importlib.import_module(f"gpu_checks.{name}") for name in names}
    )


def raises(setting):
    print("its last words")
    raise ValueError("no such thing")


def hangs(setting):
    while True:
        signal.pause()


def dies(setting):
    os._exit(3)


def run_checks(checks, functions, seconds=1000.0, **limits):
    """The results of some checks by name, and the names of those that did not run."""
    items = [
        checks.items.Item(name, 1, function, limits.get(name, 500))
        for name, function in functions.items()
    ]
    found = []
    missing = checks.runner.Runner("cpu", False, 2, found.append).run(items, seconds)
    return {result.name: result for result in found}, missing


def test_a_check_that_fails_ends_no_other(checks):
    def absent(setting):
        raise checks.items.AbsentError("not installed")

    functions = dict(raises=raises, hangs=hangs, dies=dies, absent=absent)
    functions |= dict(wrong=lambda s: {"wrong": ["a"]}, right=lambda s: {"device": s.device})
    found, missing = run_checks(checks, functions, hangs=0.01)
    assert not missing
    assert {name: result.status for name, result in found.items()} == dict(
        raises="failed", hangs="timeout", dies="failed", absent="absent", wrong="wrong", right="ok"
    )
    assert found["raises"].why == "ValueError: no such thing"
    assert "its last words" in found["raises"].log and "Traceback" in found["raises"].log
    assert "status 3" in found["dies"].why and found["absent"].why == "not installed"
    assert found["right"].facts == {"device": "cpu"}


def test_at_the_end_of_the_time_checks_are_stopped_and_named(checks):
    found, missing = run_checks(checks, dict(a=hangs, b=hangs, c=hangs), seconds=0.2)
    assert found == {} and sorted(missing) == ["a", "b", "c"]


def test_processes_are_spawned_where_cuda_forbids_to_fork(checks, monkeypatch, tmp_path):
    fork, asked = multiprocessing.get_context("fork"), []

    def context(method):
        asked.append(method)
        return fork

    def once(setting):
        if not (tmp_path / "tried").exists():
            (tmp_path / "tried").touch()
            raise RuntimeError(f"Cannot {checks.runner.NO_FORK}. To use CUDA ...")
        return {}

    monkeypatch.setattr(checks.runner.multiprocessing, "get_context", context)
    found, _ = run_checks(checks, dict(once=once))
    assert asked == ["fork", "spawn"] and found["once"].status == "ok"


def test_results_are_kept_for_the_same_machine(checks, tmp_path):
    Result, Results = checks.items.Result, checks.items.Results
    file = tmp_path / "found.json"
    one = Result("a", "ok", 1.0, {"x": 1})
    Results(file, {"gpu": "A"}).add(one)
    assert Results(file, {"gpu": "A"}).found == {"a": one}
    assert Results(file, {"gpu": "B"}).found == {}
    assert not Result("b", "wrong", 1.0, {}).is_final


def test_the_table_shows_what_failed_and_what_did_not_run(checks):
    Result = checks.items.Result
    ours, liger = {"ms": 27.0, "peak GiB": 1.4}, {"why": "ImportError: no | triton"}
    speed = {"tokens/s": 14100.0, "TFLOP/s": 400.0, "peak GiB": 18.4, "held GiB": 20.1}
    text = checks.table.tables(
        {"gpu": "H100"},
        [
            Result("rates", "ok", 1.0, {"matmul TFLOP/s": 800.0}),
            Result("method/lora", "wrong", 1.0, {"wrong": ["packed"]}),
            Result("loss/speed", "ok", 1.0, {"sides": {"7B": {"ours": ours, "liger": liger}}}),
            Result("commands/quickstart", "ok", 1.0, {"losses": [7.8, 0.1]}),
            Result("qwen2_5_7b/lora/8192/ours", "ok", 9.0, speed),
            Result("qwen2_5_7b/lora/8192/ours, offload", "ok", 9.0, speed),
            Result("qwen2_5_7b/lora/8192/plan", "ok", 9.0, {"total GiB": 19.5}),
            Result("llama2_7b/full/2048/ours", "absent", 1.0, {}, "no | room"),
        ],
        ["loss"],
    )
    assert "| qwen2_5_7b | lora | 8,192 | ours | 14,100 | 50% | 18.4 | 20.1 | 19.5 |" in text
    assert "| qwen2_5_7b | lora | 8,192 | ours, offload | 14,100 |" in text
    assert "| 7B | 27.0, 1.4 | ImportError: no / triton |" in text
    assert "| method/lora | wrong: packed | 1.0 |" in text and "no / room" in text
    assert "time was over: loss." in text


@pytest.mark.parametrize(
    ("loss", "factor", "right"),
    [(6.0, 1.01, True), (6.0, 1.1, False), (6.1, 1.0, False), (float("nan"), 1.0, False)],
)
def test_a_wrong_loss_or_gradient_is_noticed(checks, monkeypatch, tmp_path, loss, factor, right):
    outcome = checks.tiny.Outcome
    for name, function in {
        "finetuned": lambda *args, **settings: SimpleNamespace(backends=[]),
        "outcome": lambda *args: outcome(loss, factor * torch.ones(4)),
        "plain_outcome": lambda model: outcome(6.0, torch.ones(4)),
    }.items():
        monkeypatch.setattr(checks.tiny, name, function)
    monkeypatch.setattr(checks.correctness, "_use_liger", lambda use: None)
    setting = checks.items.Setting("cpu", True, tmp_path)
    wrong = checks.correctness.method(setting, "full")["wrong"]
    assert wrong == ([] if right else ["packed", "padded"])


def test_of_bitsandbytes_one_library_is_carried(checks, tmp_path):
    wheel, target = tmp_path / "a.whl", tmp_path / "out.zip"
    names = [f"bitsandbytes/libbitsandbytes_{n}.so" for n in ("cuda126", "cuda130", "cpu")]
    with zipfile.ZipFile(wheel, "w") as file:
        for name in (*names, "peft/tests/test_a.py", "peft/a.py"):
            file.writestr(name, "x")
    checks.packages.write(target, [wheel], "130")
    assert zipfile.ZipFile(target).namelist() == [*names[1:], "peft/a.py"]


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
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
    measuring = peers.measuring
    found = peers.run("other", tmp_path, measuring.SHAPES["llama_34m"], measuring.Case("full"))
    assert list(found) == ["failed"] and said in found["failed"]


def test_a_peer_that_failed_stands_beside_the_others(peers):
    facts = {"tokens_per_second": 4.0, "peak_mib": 2.0, "loss": 1.0}
    slow = facts | {"tokens_per_second": 2.0, "precision": "float32"}
    sides = {"ours": [facts, facts], "trl": [slow, slow], "other": [facts, {"failed": "why"}]}
    found = peers.measuring.compared(sides)
    assert found["other"] == {"failed": "why"}
    assert found["trl"] == slow | {"lowest_and_highest": [2.0, 2.0]}
    assert found["speed_of_ours_to_trl"] == 2.0
    assert "speed_of_ours_to_other" not in found


def test_operations_are_those_of_the_passes_that_a_case_has(peers):
    measuring = peers.measuring
    config = dict(model_type="llama", vocab_size=100, hidden_size=8, intermediate_size=16)
    config |= dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
    shape = measuring.Shape(config, max_length=64, packs_a_step=1)
    layer, head = 8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 16, 100 * 8
    found = measuring.operations(shape, measuring.Case("full"), 0.5)
    assert found == 6 * (2 * layer + 0.5 * head)
    low_rank = 64 * (2 * (8 + 8) + 2 * (8 + 4) + 3 * (8 + 16))  # of one layer
    found = measuring.operations(shape, measuring.Case("lora", "catalogue"), 0.5)
    assert found == 2 * (6 * layer + 8 * low_rank) + 4 * 0.5 * head


@pytest.fixture
def soak(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
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
