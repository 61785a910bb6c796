"""Loading a model for chat: what is damaged, hostile or not whole is refused in words."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.checkpoints import RunsCode
from xtuner.entry_point import main
from xtuner.tools.chat_loading import load_for_chat


def cut(folder):
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def another_shape(folder):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 96}))


def a_tensor_less(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def pickled(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"a": RunsCode(folder / "ran")}, folder / "pytorch_model.bin")


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def settings_that_are_none(folder):
    (folder / "config.json").write_text('["llama"]')


def setting_of_another_type(folder):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": "many"}))


def no_heads(folder):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_attention_heads": 0}))


def index_of_nothing(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}')


def tokenizer_settings_that_are_none(folder):
    (folder / "tokenizer_config.json").write_text("[]")


def ids_that_are_none(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": ["</s>"]}')


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (cut, "weights file is damaged"),
        (another_shape, "mlp.down_proj.weight: [64,"),
        (a_tensor_less, "model.layers.1.mlp.up_proj.weight is missing"),
        (pickled, "holds more than data"),
        (no_weights, "no file named"),
        (settings_that_are_none, "config.json: this holds list; an object is expected"),
        (setting_of_another_type, "config.json cannot be used: Validation error"),
        (no_heads, "cannot be used: ZeroDivisionError"),
        (index_of_nothing, "'../b' is not in this folder"),
        (tokenizer_settings_that_are_none, "cannot be used: AttributeError"),
        (ids_that_are_none, "generation_config.json: eos_token_id is ['</s>']"),
    ],
)
def test_weights_that_are_not_whole(harm, words, tiny_llama, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    harm(folder)
    assert main(["chat", str(folder)]) == 1
    shown = capsys.readouterr().err
    assert words in shown
    assert str(folder) in shown or harm is setting_of_another_type
    assert "weights_only" not in shown and "Traceback" not in shown
    assert not (folder / "ran").exists()


def test_a_whole_model_is_loaded(tiny_llama):
    model, tokenizer = load_for_chat(tiny_llama)
    assert not model.training and len(tokenizer) > 0
