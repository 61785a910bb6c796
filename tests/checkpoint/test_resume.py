"""Resuming picks the right checkpoint and refuses another run's config, data or packages."""

import json

import pytest

from tests.helpers.tiny import make_tokenizer
from xtuner.checkpoint.checkpoint import save_checkpoint
from xtuner.checkpoint.resume import (
    changes,
    checkpoint_to_resume,
    fingerprints,
    refuse_changes,
    resume_command,
    truncate_metrics,
)
from xtuner.utils.errors import UserError

CONFIG = {
    "lr": 1e-4,
    "work_dir": "a",
    "model": {"type": UserError, "llm": {"name": "tiny"}},
    "train_dataloader": {"batch_size": 1, "num_workers": 0},
    "optim_wrapper": {"optimizer": {"lr": 1e-4, "betas": (0.9, 0.999)}},
    "param_scheduler": [{"type": "LinearLR", "end": 0.1}, {"type": "Cosine", "end": 3}],
    "train_cfg": {"max_epochs": 3},
    "default_hooks": {"logger": {"interval": 10}},
}
ROWS = [{"input_ids": [i, 2, 3], "labels": [-100, 2, 3]} for i in range(10)]


def changed(**values):
    config = json.loads(json.dumps(CONFIG, default=str)) | {"model": CONFIG["model"]}
    config["optim_wrapper"]["optimizer"]["betas"] = (0.9, 0.999)
    for path, value in values.items():
        *outer, last = path.split("__")
        place = config
        for key in outer:
            place = place[int(key) if key.isdigit() else key]
        place[last] = value
    return config


def kinds(before, now):
    return [change.kind for change in changes(before, now) if not change.harmless]


def test_the_same_run_has_not_changed():
    assert changes(fingerprints(config=CONFIG), fingerprints(config=changed())) == []


@pytest.mark.parametrize(
    "harmless",
    [
        {"work_dir": "b"},
        {"default_hooks__logger": {"interval": 1}},
        {"train_dataloader__num_workers": 4},
    ],
)
def test_where_and_what_is_shown_does_not_matter(harmless):
    assert changes(fingerprints(config=CONFIG), fingerprints(config=changed(**harmless))) == []


def test_longer_training_is_told_and_gone_along_with():
    now = fingerprints(config=changed(train_cfg__max_epochs=5, param_scheduler__1__end=5))
    found = changes(fingerprints(config=CONFIG), now)
    said = refuse_changes(found, (), "iter_4.pth")
    assert any("train_cfg.max_epochs: 3 -> 5" in line for line in said)
    moved = fingerprints(config=changed(param_scheduler__1__end=5))  # the schedule alone
    with pytest.raises(UserError, match=r"param_scheduler\.1\.end: 3 -> 5"):
        refuse_changes(changes(fingerprints(config=CONFIG), moved), (), "iter_4.pth")


def test_all_changes_are_listed_at_once_and_can_be_allowed():
    tokenizer = make_tokenizer()
    before = fingerprints(config=CONFIG, dataset=ROWS, tokenizer=tokenizer, world_size=1)
    before["packages"]["torch"] = "2.0"
    tokenizer.add_tokens(["<new>"])
    now = fingerprints(
        config=changed(optim_wrapper__optimizer__lr=2e-4),
        dataset=ROWS[:-1],
        tokenizer=tokenizer,
        world_size=2,
    )
    found = changes(before, now)
    assert sorted(kinds(before, now)) == ["config", "data", "packages", "tokenizer", "world_size"]
    with pytest.raises(UserError) as caught:
        refuse_changes(found, {"data"}, "iter_4.pth")
    text = str(caught.value)
    for part in ("optimizer.lr: 0.0001 -> 0.0002", "torch: 2.0 -> ", "world_size: 1 -> 2"):
        assert part in text
    assert "--resume-allow config,packages,tokenizer,world_size" in text
    assert len(refuse_changes(found, {"all"}, "iter_4.pth")) == len(found)


def test_other_tokens_or_labels_in_as_many_rows_are_noticed():
    before = fingerprints(config={}, dataset=ROWS)
    other = [*ROWS[:9], {"input_ids": [9, 2, 3], "labels": [-100, -100, 3]}]
    assert kinds(before, fingerprints(config={}, dataset=other)) == ["data"]
    assert kinds(before, fingerprints(config={}, dataset=list(ROWS))) == []


def test_an_unknown_word_of_resume_allow_is_refused():
    with pytest.raises(UserError, match="does not know datas") as caught:
        refuse_changes([], {"datas"}, "iter_4.pth")
    assert caught.value.hint == "--resume-allow config,data,tokenizer,packages,world_size"


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
