"""A training's data are examined before its model is loaded."""

from __future__ import annotations

import contextlib
import functools
import json
import logging

import pytest
from datasets import Dataset

from tests.e2e.test_own_code import say
from tests.e2e.test_printed_commands import config_text
from tests.helpers.tiny import make_tokenizer
from xtuner.engine.runner import finetune_runner
from xtuner.engine.runner.training_runner import require_embeddings
from xtuner.entry_point import main
from xtuner.utils.errors import UserError


def places(data):
    return [f"a.jsonl:{row + 1}" for row in data["rows"]]


@pytest.mark.parametrize("column", ["input_ids", "rejected_ids"])
def test_the_row_of_an_id_beyond_the_vocabulary_is_named(column, tiny_llama):
    size = json.loads((tiny_llama / "config.json").read_text())["vocab_size"]
    rows = [[1, 2], [], [3, size - 1], [size + 4, 1]]
    dataset = Dataset.from_dict({column: rows, "rows": [[0], [1], [2], [3]]})
    model = {"llm": {"pretrained_model_name_or_path": str(tiny_llama)}}
    with pytest.raises(UserError, match=rf"token id {size + 4}, .* {size} entries.*a\.jsonl:4"):
        require_embeddings(dataset, model, places)
    require_embeddings(dataset.select(range(3)), model, places)
    require_embeddings(dataset, {**model, "tokenizer": object()}, places)
    require_embeddings(dataset, {}, places)
    require_embeddings([{"input_ids": [size]}], model, places)  # rows that are read one by one


def test_before_the_model_is_loaded(tiny_llama, tmp_path, capsys, monkeypatch):
    tokenizer = make_tokenizer()
    size = json.loads((tiny_llama / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"<{n}>" for n in range(len(tokenizer), size + 1)])
    tokenizer.save_pretrained(tmp_path / "tokens")
    rows = tmp_path / "rows.jsonl"
    good, bad = ({"conversation": [{"input": "hi", "output": o}]} for o in ("yes", f"<{size}>"))
    rows.write_text(f"{json.dumps(good)}\n{json.dumps(bad)}\n")
    text = config_text(str(tiny_llama), str(rows), "qwen_chat", lora=False)
    text = text.replace(
        "tokenizer = dict(type=AutoTokenizer.from_pretrained, pretrained_model_name_or_path=base)",
        f"tokenizer = dict(type=AutoTokenizer.from_pretrained, "
        f"pretrained_model_name_or_path={str(tmp_path / 'tokens')!r})",
    )
    config = tmp_path / "c.py"
    config.write_text(text, "utf-8")

    def load(*_, **__):
        raise AssertionError("the model is loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    assert main(["train", str(config), "--work-dir", str(tmp_path / "w")]) == 1
    said = capsys.readouterr().err
    assert f"{rows}:2" in said and "the token id" in said
    assert "the model is loaded" not in said
    assert "XT0344" in say(capsys, "check-cfg", config)


def test_a_log_file_on_a_full_disk_is_said_once(capsys):
    handler = logging.FileHandler("/dev/full")
    handler.handleError = functools.partial(finetune_runner._report_once, handler)
    logger = logging.Logger("full")
    logger.addHandler(handler)
    for number in range(3):
        logger.warning("line %d", number)
    said = capsys.readouterr().err
    assert said == (
        "/dev/full cannot be written (No space left on device); training continues without it.\n"
    )
    with contextlib.suppress(OSError):
        handler.close()
