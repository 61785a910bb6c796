"""The start of a run: what a user gets wrong is said in one message, before anything takes long."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.engine.toy import write_config
from xtuner.entry_point import main

LANGUAGE_MODEL = """
from transformers import AutoModelForCausalLM, AutoTokenizer
model = dict(
    type=ToyModel,
    llm=dict(type=AutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path={name!r}),
)
"""


def fails(capsys, *words: str, work_dir: Path) -> str:
    """Run ``xtuner train``, which must fail, and return what it says."""
    status = main(["train", *words, "--work-dir", str(work_dir)])
    said = capsys.readouterr().err
    assert status not in (0, None)
    assert "Traceback" not in said
    return said


def test_no_such_config(tmp_path, capsys):
    said = fails(capsys, str(tmp_path / "nothing.py"), work_dir=tmp_path)
    assert "nothing.py" in said


def test_a_syntax_error(tmp_path, capsys):
    config = tmp_path / "broken.py"
    config.write_text("lr = 1\nmodel = dict(\n")
    assert f"{config}:2" in fails(capsys, str(config), work_dir=tmp_path)


def test_a_config_without_a_model(tmp_path, capsys):
    config = tmp_path / "empty.py"
    config.write_text("lr = 1e-4\n")
    said = fails(capsys, str(config), work_dir=tmp_path)
    assert "sets no model, train_dataloader, optim_wrapper, train_cfg" in said
    assert "xtuner copy-cfg" in said


def test_a_model_folder_that_is_not_there(tmp_path, capsys):
    config = write_config(tmp_path, LANGUAGE_MODEL.format(name="./no/such/folder"))
    said = fails(capsys, str(config), work_dir=tmp_path / "out")
    assert "./no/such/folder" in said
    assert "model.llm.pretrained_model_name_or_path" in said


def test_a_name_on_the_hub_without_network(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    config = write_config(tmp_path, LANGUAGE_MODEL.format(name="internlm/internlm2_5-7b-chat"))
    said = fails(capsys, str(config), work_dir=tmp_path / "out")
    assert "internlm/internlm2_5-7b-chat is not on this machine" in said
    assert "--cfg-options model.pretrained=/PATH" in said


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_work_dir(tmp_path, capsys):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    said = fails(capsys, str(write_config(tmp_path)), work_dir=folder / "out")
    assert "cannot be written to" in said
    assert "--work-dir" in said


def test_a_work_dir_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    said = fails(capsys, str(write_config(tmp_path)), work_dir=tmp_path / "file" / "out")
    assert "cannot be written to" in said


def test_a_checkpoint_that_is_not_there(tmp_path, capsys):
    words = ["--resume", str(tmp_path / "iter_7.pth")]
    said = fails(capsys, str(write_config(tmp_path)), *words, work_dir=tmp_path / "out")
    assert "iter_7.pth" in said
    assert "no such checkpoint" in said


def test_a_damaged_checkpoint(tmp_path, capsys):
    config, out = write_config(tmp_path), tmp_path / "out"
    assert main(["train", str(config), "--work-dir", str(out)]) == 0
    capsys.readouterr()
    file = out / "iter_8.pth"
    file.write_bytes(file.read_bytes()[:-100])
    said = fails(capsys, str(config), "--resume", str(file), work_dir=out)
    assert "iter_8.pth" in said
    assert "cannot be used" in said


def test_nothing_to_train(tmp_path, capsys):
    frozen = """
from tests.engine.toy import Frozen
model = dict(type=Frozen)
"""
    said = fails(capsys, str(write_config(tmp_path, frozen)), work_dir=tmp_path / "out")
    assert "nothing of the model is trained" in said


def test_the_configs_own_functions_are_called_first(tmp_path):
    extra = f"""
from tests.engine.toy import leave_a_note
before_run = [dict(type=leave_a_note, path={str(tmp_path / "note")!r}, text="hello")]
"""
    out = tmp_path / "out"
    assert main(["train", str(write_config(tmp_path, extra)), "--work-dir", str(out)]) == 0
    assert (tmp_path / "note").read_text() == "hello"


def test_the_seed_of_the_command_line_counts(tmp_path):
    config, first_losses = write_config(tmp_path), []
    for seed in ("1", "1", "2"):
        out = tmp_path / f"out{len(first_losses)}"
        words = ["--work-dir", str(out), "--seed", seed]
        assert main(["train", str(config), *words]) == 0
        text = (out / "metrics.jsonl").read_text()
        first_losses.append(text.partition('"loss": ')[2].partition(",")[0])
    assert first_losses[0] == first_losses[1] != first_losses[2]


def test_a_test_without_metrics_measures_the_loss(tmp_path, capsys):
    config, out = write_config(tmp_path), tmp_path / "out"
    assert main(["train", str(config), "--work-dir", str(out)]) == 0
    capsys.readouterr()
    words = ["--work-dir", str(tmp_path / "test")]
    assert main(["test", str(config), *words]) == 0
    base = capsys.readouterr().out
    assert "measuring the base model (no --checkpoint) on the train data" in base
    assert main(["test", str(config), "--checkpoint", str(out / "iter_8.pth"), *words]) == 0
    trained = capsys.readouterr().out

    def loss(text: str) -> float:
        (line,) = [line for line in text.splitlines() if line.startswith("loss ")]
        return float(line.split()[1])

    assert loss(trained) < loss(base)


def test_a_test_of_no_checkpoint_is_refused(tmp_path, capsys):
    status = main(["test", str(write_config(tmp_path)), "--checkpoint", "/no/iter_1.pth"])
    assert status == 1
    assert "there is no such checkpoint" in capsys.readouterr().err


STOPS_EARLY = """
from mmengine.hooks import EarlyStoppingHook
val_dataloader = dict(
    batch_size=2,
    num_workers=0,
    dataset=dict(type=ToyRows, seed=1),
    sampler=dict(type=DefaultSampler, shuffle=False),
    collate_fn=dict(type=collate),
)
train_cfg = dict(type=TrainLoop, max_epochs=10, val_interval=8)
param_scheduler = []
default_hooks.update(checkpoint=dict(
    type=CheckpointHook, by_epoch=False, interval=100, save_best="loss", rule="less"
))
custom_hooks = [
    dict(type=EarlyStoppingHook, monitor="loss", rule="less", min_delta=100.0, patience=2)
]
"""


def test_validation_keeps_the_best_and_stops_early(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["train", str(write_config(tmp_path, STOPS_EARLY)), "--work-dir", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "validation  loss" in printed
    assert printed.count("stopping early: loss is ") == 1 and "after iteration 24" in printed
    assert len(list(out.glob("best_loss_iter_*.pth"))) == 1
    assert (out / "metrics.jsonl").read_text().count("val/loss") == 3  # one, then two no better


@pytest.mark.parametrize("killed_after", [8, 16, 24])
def test_a_resumed_run_stops_early_where_an_undisturbed_one_does(tmp_path, killed_after):
    config = write_config(tmp_path, STOPS_EARLY.replace("interval=100", "interval=8"))
    out = tmp_path / "out"
    assert main(["train", str(config), "--work-dir", str(out)]) == 0
    for checkpoint in out.glob("iter_*.pth*"):
        if int(checkpoint.name.split(".")[0].removeprefix("iter_")) > killed_after:
            checkpoint.unlink()
    assert main(["train", str(config), "--work-dir", str(out), "--resume"]) == 0
    assert (out / "metrics.jsonl").read_text().count("val/loss") == 3


@pytest.mark.parametrize(("launcher", "built"), [("pytorch", ["train", "val"]), ("none", [])])
def test_several_processes_prepare_data_before_they_meet(monkeypatch, launcher, built):
    """However long it takes: nothing waits for it but a lock."""
    from mmengine.config import Config

    from xtuner.dataset import process_hf_dataset
    from xtuner.engine import train
    from xtuner.registry import BUILDER

    seen = []
    monkeypatch.setattr(BUILDER, "build", lambda dataset: seen.append(dataset["name"]))
    cfg = Config(
        dict(
            launcher=launcher,
            train_dataloader=dict(dataset=dict(type=process_hf_dataset, name="train")),
            val_dataloader=dict(dataset=dict(type=process_hf_dataset, name="val")),
        )
    )
    train._prepare_data(cfg)
    assert seen == built
    own = dict(type=dict, name="somebody's own, which may be slow to build twice")
    train._prepare_data(Config(dict(launcher=launcher, train_dataloader=dict(dataset=own))))
    assert seen == built


@pytest.mark.parametrize(
    "train_cfg",
    [
        "dict(by_epoch=True, max_epochs=3, val_interval=2)",
        "dict(type=EpochBasedTrainLoop, max_epochs=3, val_interval=2)",
    ],
)
def test_validation_intervals_in_epochs(tmp_path, train_cfg):
    """The form of early guides: after the second epoch of eight rows, and at the end."""
    text = (
        STOPS_EARLY.partition("train_cfg =")[0]
        + f"""
from mmengine.runner import EpochBasedTrainLoop
train_cfg = {train_cfg}
param_scheduler = []
"""
    )
    out = tmp_path / "out"
    assert main(["train", str(write_config(tmp_path, text)), "--work-dir", str(out)]) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["iter"] for line in lines if "val/loss" in line] == [16, 24]


@pytest.mark.parametrize(
    ("launcher", "environment", "first"),
    [
        ("none", {"SLURM_PROCID": "3"}, True),
        ("pytorch", {"RANK": "0"}, True),
        ("pytorch", {"RANK": "1", "SLURM_PROCID": "0"}, False),
        ("slurm", {"SLURM_PROCID": "1"}, False),
        ("mpi", {"OMPI_COMM_WORLD_RANK": "1"}, False),
        ("mpi", {"OMPI_COMM_WORLD_RANK": "1", "SLURM_PROCID": "0"}, False),
        ("mpi", {"OMPI_COMM_WORLD_RANK": "0"}, True),
    ],
)
def test_one_process_is_the_first(monkeypatch, launcher, environment, first):
    """Whoever started it: with MPI, RANK is unset, and every process once wrote the config."""
    from xtuner.engine.train import is_first

    for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_first(launcher) is first


def test_the_written_config_trains_the_same_run(tmp_path):
    config, losses = write_config(tmp_path), []
    words = ["--cfg-options", "lr=0.02", "--seed", "4"]
    for number in range(2):
        out = tmp_path / f"out{number}"
        assert main(["train", str(config), "--work-dir", str(out), *words]) == 0
        lines = (out / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line).get("loss") for line in lines])
        config, words = out / config.name, []
    assert losses[0] == losses[1]
