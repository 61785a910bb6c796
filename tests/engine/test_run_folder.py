"""A second training: where it goes, and that nothing of the first is replaced without a word."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.e2e.test_own_code import say
from tests.engine.toy import write_config
from xtuner.engine.run_folder import run_folder
from xtuner.entry_point import main
from xtuner.utils.errors import UserError


def test_the_default_work_dir(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path, "default_hooks.update(logger=None)\n")
    say(capsys, "train", config)
    work_dir = Path("work_dirs/toy_config")
    before = {p: p.read_bytes() for p in work_dir.glob("*") if p.is_file()}
    assert {"iter_8.pth", "metrics.jsonl"} <= {path.name for path in before}
    said = say(capsys, "train", config, "--cfg-options", "lr=0.02")
    second = (work_dir / "latest").resolve()
    assert re.fullmatch(r"\d{8}_\d{6}(_\d+)?", second.name)
    assert f"this one goes to {work_dir / second.name}" in said
    assert {p: p.read_bytes() for p in before} == before
    assert (second / "iter_8.pth").is_file() and "lr = 0.02" in (second / config.name).read_text()
    convert = next(line for line in said.splitlines() if "pth_to_hf" in line)
    assert Path(shlex.split(convert)[4]).resolve() == second / "iter_8.pth"
    said = say(capsys, "train", config, "--resume", "--cfg-options", "lr=0.02")
    assert "after iteration 8" in said and second.name in said


def test_a_work_dir_that_was_named(tmp_path, capsys):
    config = write_config(tmp_path)
    out = tmp_path / "out"
    words = ["train", str(config), "--work-dir", str(out)]
    assert main(words) == 0
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "holds a run already (iter_8.pth)" in said and "--overwrite" in said
    assert main([*words, "--overwrite", "--cfg-options", "train_cfg.max_epochs=0.5"]) == 0
    assert [path.name for path in out.glob("*.pth")] == ["iter_4.pth"]


def test_several_processes_are_told_to_name_a_folder(tmp_path):
    (tmp_path / "iter_1.pth").touch()
    choices = dict(chosen=False, resume=False, overwrite=False)
    with pytest.raises(UserError, match="holds a run already"):
        run_folder(str(tmp_path), alone=False, **choices)
    assert run_folder(str(tmp_path / "new"), alone=False, **choices) == str(tmp_path / "new")


def test_two_runs_within_a_second(tmp_path, monkeypatch):
    """mmengine's folder of the first run's logs is named by the time too."""
    monkeypatch.setattr("time.strftime", lambda form: "20261127_030837")
    (tmp_path / "iter_1.pth").touch()
    choices = dict(chosen=False, resume=False, overwrite=False, alone=True)
    for name in ("20261127_030837", "20261127_030837_2", "20261127_030837_3"):
        assert run_folder(str(tmp_path), **choices) == str(tmp_path / name)
        assert (tmp_path / "latest").resolve() == tmp_path / name
