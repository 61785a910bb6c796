"""The first row of the data, as it is trained on."""

from __future__ import annotations

from pathlib import Path

from tests.engine.toy import IGNORED, make_runner
from xtuner.engine.hooks import (
    DatasetInfoHook,
)


def test_dataset_info_shows_what_is_learnt(tokenizer):
    ids = tokenizer.encode("Hello world", add_special_tokens=False)
    hook = DatasetInfoHook(tokenizer)
    half = len(ids) // 2
    labels = [IGNORED] * half + ids[half:]
    expected = f"{tokenizer.decode(ids[:half])}[[{tokenizer.decode(ids[half:])}]]"
    assert hook.decode_with_mask(ids, labels) == expected
    assert hook.decode_with_mask([*ids, -200], [IGNORED] * (len(ids) + 1)).endswith("<200>")


def test_dataset_info_logs_the_first_row(tmp_path, tokenizer, monkeypatch):
    hook = DatasetInfoHook(tokenizer)
    monkeypatch.setattr(hook, "_decode", lambda ids: "a\x1b[2Jb")
    runner = make_runner(tmp_path, hooks=[hook])
    runner.train()
    (log,) = Path(runner.log_dir).glob("*.log")
    assert "train: 8 rows after preparation" in log.read_text()
    assert "a[2Jb" in log.read_text() and "\x1b" not in log.read_text()
