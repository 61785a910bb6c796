"""Resuming picks the right checkpoint and says how to go on."""

import json

import pytest

from xtuner.checkpoint.checkpoint import save_checkpoint
from xtuner.checkpoint.resume import (
    checkpoint_to_resume,
    require_progress,
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


@pytest.mark.parametrize("by_path", [False, True])
def test_without_a_usable_checkpoint_nothing_is_overwritten(tmp_path, by_path):
    for number in (4, 8):
        path = tmp_path / f"iter_{number}.pth"
        save_checkpoint(path, {"meta": {"iter": number}, "state_dict": {}})
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError) as refused:
        checkpoint_to_resume(tmp_path, tmp_path if by_path else True)
    if not by_path:
        assert "none of the 2 checkpoints" in str(refused.value)
        assert "--resume-allow restart" in refused.value.hint
        with pytest.raises(UserError):  # it says nothing about damaged checkpoints
            checkpoint_to_resume(tmp_path, True, ["all"])
        assert checkpoint_to_resume(tmp_path, True, ["restart"]) is None


def test_what_was_logged_after_the_checkpoint_is_cut(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"iter": i, "loss": i / 2}) for i in range(1, 8)]
    metrics.write_text("[]\n5\n" + "\n".join(lines) + '\n{"iter": 3, "lo')
    truncate_metrics(metrics, 4)
    assert metrics.read_text().splitlines() == lines[:4]
    truncate_metrics(tmp_path / "none.jsonl", 4)


def test_the_hint_is_a_command(tmp_path):
    (tmp_path / "my.py").write_text("model = dict()\n")
    hint = resume_command(tmp_path / "iter_4.pth")
    assert f"xtuner train {tmp_path / 'my.py'} --work-dir {tmp_path} --resume" in hint


@pytest.mark.parametrize("meta", [None, {}, {"iter": "four"}, {"iter": -3}, {"iter": True}])
def test_a_checkpoint_that_does_not_say_how_far_it_was(meta, tmp_path):
    with pytest.raises(UserError, match="how many iterations"):
        require_progress({"meta": meta}, tmp_path / "iter_4.pth")
    require_progress({"meta": {"iter": 4}}, tmp_path / "iter_4.pth")
