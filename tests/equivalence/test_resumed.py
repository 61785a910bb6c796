"""A run that was interrupted and resumed leaves, to the bit, what an undisturbed one leaves."""

import os
import shutil
import signal
import sys
from pathlib import Path

import psutil
import pytest
import torch

from tests.equivalence.runs import ROOT, TOY, start, train
from tests.equivalence.toy_language_model import write_config
from tests.helpers.forked import LIMIT, Forked, run, wait_for
from tests.helpers.tiers import few_fast, slow
from xtuner.checkpoint.checkpoint import find_corruption, find_latest, load_checkpoint
from xtuner.checkpoint.serialize import mmengine_hub
from xtuner.proving.outcome import differences, metrics, outcome

VARIANTS = {
    "steps that cross epochs": [],
    "one micro-batch a step": ["accumulative_counts=1", "save_steps=5"],
    "an interval within a step": ["accumulative_counts=3", "save_steps=4"],
    "at the end of epochs": ["accumulative_counts=1", "save_steps=11"],
    "by epoch": ["by_epoch=True", "save_steps=1"],
    "two workers": ["train_dataloader.num_workers=2"],
    "a seed that is drawn": ["randomness.seed=None"],
}
FAST = ("an interval within a step", "a seed that is drawn")


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Run a variant in peace, all checkpoints kept; once for all tests that want it."""
    done: dict[str, Path] = {}

    def run(variant: str) -> Path:
        if variant not in done:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            options = [*VARIANTS[variant], "save_total_limit=-1"]
            status, printed = train(TOY, folder, "--cfg-options", *options)
            assert status == 0, printed
            done[variant] = folder
        return done[variant]

    return run


def interrupted(whole: Path, checkpoint: str, folder: Path) -> Path:
    """The work dir as a kill some time after ``checkpoint`` leaves it."""
    folder.mkdir()
    for name in (checkpoint, f"{checkpoint}.json", "metrics.jsonl"):
        shutil.copy(whole / name, folder)
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"iter": 3, "los')  # killed while writing a line
    return folder


@pytest.mark.parametrize("variant", few_fast(VARIANTS, FAST))
def test_resumed_from_any_checkpoint_equals_uninterrupted(undisturbed, tmp_path, variant):
    whole = undisturbed(variant)
    expected = outcome(whole)
    checkpoints = sorted(whole.glob("*.pth"), key=lambda file: file.stat().st_mtime)
    assert len(checkpoints) >= 3
    middle = len(checkpoints) // 2
    for number in {0, middle, len(checkpoints) - 1}:
        folder = interrupted(whole, checkpoints[number].name, tmp_path / str(number))
        options = [*VARIANTS[variant], "save_total_limit=-1"]
        status, printed = train(TOY, folder, "--resume", "--cfg-options", *options)
        assert status == 0, printed
        assert f"Resuming from {folder / checkpoints[number].name}" in printed
        found = list(differences(expected, outcome(folder)))
        assert not found, f"from {checkpoints[number].name}: {found}"


@pytest.mark.parametrize("quantized", [False, True], ids=["lora", "qlora"])
def test_an_adapter_resumed_equals_uninterrupted(tiny_llama, tmp_path, quantized):
    if quantized:
        pytest.importorskip("bitsandbytes")
    config = write_config(TOY, tmp_path / "adapter.py", tiny_llama, quantized)
    options = ["--cfg-options", "max_epochs=1", "save_total_limit=-1"]
    status, printed = train(config, tmp_path / "whole", *options)
    assert status == 0, printed
    expected = outcome(tmp_path / "whole")
    assert all("lora_" in name for name in expected["state_dict"])
    folder = interrupted(tmp_path / "whole", "iter_4.pth", tmp_path / "resumed")
    status, printed = train(config, folder, "--resume", *options)
    assert status == 0, printed
    found = list(differences(expected, outcome(folder)))
    assert not found, found


def test_a_damaged_newest_is_named_and_the_one_before_used(undisturbed, tmp_path):
    whole = undisturbed("steps that cross epochs")
    folder = interrupted(whole, "iter_8.pth", tmp_path / "run")
    for name in ("iter_12.pth", "iter_12.pth.json"):
        shutil.copy(whole / name, folder)
    os.truncate(folder / "iter_12.pth", 1000)
    status, printed = train(TOY, folder, "--resume", "--cfg-options", "save_total_limit=-1")
    assert status == 0, printed
    assert "iter_12.pth is damaged" in printed and "Resuming from" in printed
    assert not list(differences(outcome(whole), outcome(folder)))


def test_only_so_many_are_kept_and_the_last_is_noted(tmp_path):
    status, printed = train(TOY, tmp_path / "run", "--cfg-options", "max_epochs=1")
    assert status == 0, printed
    names = sorted(file.name for file in (tmp_path / "run").glob("iter_*"))
    assert names == ["iter_11.pth", "iter_11.pth.json", "iter_8.pth", "iter_8.pth.json"]
    assert (tmp_path / "run" / "last_checkpoint").read_text().endswith("iter_11.pth")


@pytest.mark.parametrize(
    ("option", "kind", "text"),
    [
        ("lr=0.02", "config", "optim_wrapper.optimizer.lr: 0.01 -> 0.02"),
        ("rows=24", "data", "22 -> 24"),
    ],
)
def test_a_changed_run_is_refused_unless_allowed(undisturbed, tmp_path, option, kind, text):
    whole = undisturbed("steps that cross epochs")
    folder = interrupted(whole, "iter_32.pth", tmp_path / "run")
    status, printed = train(TOY, folder, "--resume", "--cfg-options", option)
    assert status == 1 and f"  {kind}: {text}" in printed and "--resume-allow" in printed
    words = ["--resume", "--resume-allow", "config,data", "--cfg-options", option]
    status, printed = train(TOY, folder, *words)
    assert status == 0, printed


@pytest.mark.parametrize(
    "option",
    ["lr=0.5", "param_scheduler.1.eta_min=0.002", "optim_wrapper.optimizer.weight_decay=0.3"],
)
def test_an_allowed_change_takes_effect(undisturbed, tmp_path, option):
    """Rates are those of a run that had the new setting from its start; the weights show it."""
    whole = undisturbed("steps that cross epochs")
    other, folder = tmp_path / "other", interrupted(whole, "iter_8.pth", tmp_path / "run")
    status, printed = train(TOY, other, "--cfg-options", option)
    assert status == 0, printed
    words = ["--resume", "--resume-allow", "config", "--cfg-options", option]
    status, printed = train(TOY, folder, *words)
    assert status == 0, printed
    assert "changed since the checkpoint" in (next(folder.glob("*/*.log"))).read_text()
    rates, expected = (
        {line["iter"]: line["lr"] for line in metrics(run) if line.get("lr") and line["iter"] > 8}
        for run in (folder, other)
    )
    assert rates == expected and len(rates) > 10
    states = [load_checkpoint(run / "iter_33.pth") for run in (whole, folder, other)]
    for group, wanted in zip(*(s["optimizer"]["param_groups"] for s in states[1:]), strict=True):
        assert group == wanted
    assert list(differences(states[0]["state_dict"], states[1]["state_dict"]))


def test_training_longer_follows_the_longer_schedule(undisturbed, tmp_path):
    whole = undisturbed("steps that cross epochs")
    folder = interrupted(whole, "iter_8.pth", tmp_path / "run")
    status, printed = train(TOY, folder, "--resume", "--cfg-options", "max_epochs=5")
    assert status == 0, printed
    rates = {line["iter"]: line["lr"] for line in metrics(folder) if "lr" in line}
    assert max(rates) == 55
    assert rates[32] > 0.3 * 0.01  # at its end in the shorter run


def test_other_data_goes_on_after_the_same_share_of_an_epoch(undisturbed, tmp_path):
    whole = undisturbed("steps that cross epochs")
    folder = interrupted(whole, "iter_8.pth", tmp_path / "run")
    words = ["--resume", "--resume-allow", "config,data", "--cfg-options", "rows=44"]
    status, printed = train(TOY, folder, *words)
    assert status == 0, printed
    assert "16 of 66 iterations are done" in printed


def test_a_path_that_is_not_there_is_said(tmp_path):
    status, printed = train(TOY, tmp_path, "--resume", str(tmp_path / "iter_7.pth"))
    assert status == 1 and "no such checkpoint" in printed and "Traceback" not in printed


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), slow(signal.SIGINT, 130)])
def test_a_signal_ends_the_run_with_a_checkpoint_and_a_hint(tmp_path, number, status):
    options = ["--cfg-options", "max_epochs=300", "save_steps=50"]
    run = Forked("-m", "xtuner", "train", TOY, "--work-dir", tmp_path / "run", *options)
    wait_for((tmp_path / "run" / "iter_50.pth.json").exists, run)
    run.send_signal(number)
    assert run.wait() == status, run.stderr
    printed = run.stdout + run.stderr
    assert f"{number.name} was received" in printed and "--resume" in printed
    assert "Traceback" not in printed
    newest = find_latest(tmp_path / "run")
    assert f"{newest} is written" in printed and find_corruption(newest) is None
    assert int(newest.stem.removeprefix("iter_")) > 50


@pytest.mark.slow
def test_a_signal_to_two_processes_gives_one_checkpoint_and_one_message(tmp_path):
    options = ["--cfg-options", "max_epochs=3000", "save_steps=50"]
    run = start(TOY, tmp_path / "run", *options, processes=2)
    wait_for((tmp_path / "run" / "iter_50.pth.json").exists, run)
    run.send_signal(signal.SIGTERM)
    printed, _ = run.communicate(timeout=LIMIT)
    assert run.returncode == 143, printed
    assert printed.count("SIGTERM was received: after this optimizer step") == 1, printed
    assert printed.count("SIGTERM was received") == 2, printed  # at once, and at the end
    assert "Traceback" not in printed
    assert len(load_checkpoint(find_latest(tmp_path / "run"))["random_states"]) == 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells processes of their parent's end")
def test_no_process_outlives_a_kill_9_of_the_first(tmp_path):
    options = ["--cfg-options", "max_epochs=3000", "save_steps=50"]
    run = start(TOY, tmp_path / "run", *options, processes=2)
    wait_for((tmp_path / "run" / "iter_50.pth.json").exists, run)
    others = psutil.Process(run.pid).children(recursive=True)
    assert len(others) >= 2
    run.kill()
    run.wait()
    _, alive = psutil.wait_procs(others, timeout=LIMIT)
    assert not alive


def test_a_checkpoint_of_v0_1_is_resumed(undisturbed, tmp_path):
    state = load_checkpoint(undisturbed("steps that cross epochs") / "iter_8.pth")
    published = {
        "meta": {"iter": 8, "epoch": 0, "seed": 3, "cfg": "", "mmengine_version": "0.10.3"},
        "message_hub": mmengine_hub(state["message_hub"]),  # pickled HistoryBuffers
        **{key: state[key] for key in ("state_dict", "optimizer", "param_schedulers")},
    }
    torch.save(published, tmp_path / "iter_8.pth")
    status, printed = train(TOY, tmp_path / "run", "--resume", str(tmp_path / "iter_8.pth"))
    assert status == 0, printed
    assert "8 of 33 iterations are done" in printed
    assert outcome(tmp_path / "run")["iter"] == 33


def test_kill_9_at_random_moments(tmp_path):
    """Three rounds; ``benchmarks/kill_resume.py`` does fifty."""
    script = ROOT / "benchmarks" / "kill_resume.py"
    done = run(script, "--rounds", "3", "--keep", tmp_path / "runs")
    assert "3 kills" in done.stdout and " 0 differences" in done.stdout
