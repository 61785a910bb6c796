"""Resuming picks the right checkpoint and says how to go on."""

import json

import pytest

from xtuner.checkpoint.checkpoint import save_checkpoint
from xtuner.checkpoint.resume import (
    checkpoint_to_resume,
    resume_command,
    truncate_metrics,
)
from xtuner.utils.errors import UserError


def test_which_checkpoint(tmp_path):
    assert checkpoint_to_resume(tmp_path, False) is None
    assert checkpoint_to_resume(tmp_path, True) is None
    save_checkpoint(tmp_path / "iter_4.pth", {"meta": {"iter": 4}, "state_dict": {}})
    assert checkpoint_to_resume(tmp_path, True) == tmp_path / "iter_4.pth"
    assert checkpoint_to_resume("elsewhere", tmp_path) == tmp_path / "iter_4.pth"
    with pytest.raises(UserError, match="no such checkpoint") as caught:
        checkpoint_to_resume(tmp_path, str(tmp_path / "iter_5.pth"))
    assert "iter_4.pth" in caught.value.hint


def test_what_was_logged_after_the_checkpoint_is_cut(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"iter": i, "loss": i / 2}) for i in range(1, 8)]
    metrics.write_text("\n".join(lines) + '\n{"iter": 3, "lo')
    truncate_metrics(metrics, 4)
    assert metrics.read_text().splitlines() == lines[:4]
    truncate_metrics(tmp_path / "none.jsonl", 4)


def test_the_hint_is_a_command(tmp_path):
    (tmp_path / "my.py").write_text("")
    hint = resume_command(tmp_path / "iter_4.pth")
    assert f"xtuner train {tmp_path / 'my.py'} --work-dir {tmp_path} --resume" in hint
