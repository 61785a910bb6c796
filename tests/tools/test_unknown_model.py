"""Commands that need a model say so in two lines when it cannot be had."""

import pytest

from xtuner.entry_point import main

RECIPE = "internlm2_5_chat_7b_qlora_alpaca_e3"
UNKNOWN = ["--cfg-options", "pretrained_model_name_or_path=nobody/nothing-here"]
TOKENIZER = ["--tokenizer-path", "nobody/nothing-here"]


@pytest.mark.parametrize(
    "words",
    [
        ["log-dataset", RECIPE, *UNKNOWN],
        ["preprocess", "sft", RECIPE, "out", *UNKNOWN],
        ["check-template", RECIPE],
        ["preprocess", "folder", "--data-folder", ".", "--save-folder", "o", *TOKENIZER],
        ["preprocess", "ftdp", "--processed-dir", ".", "--tokenized-dir", "o", *TOKENIZER],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_every_command_answers_an_unknown_model_in_two_lines(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    for name in ("rows.json", "rows.jsonl"):
        (tmp_path / name).write_text("[]")
    assert main(words) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 2 and "is not on this machine" in said[0], said
