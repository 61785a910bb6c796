"""Reading a folder of weights: what is refused, and what is found where."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from xtuner.export.weights import Weights, shown
from xtuner.utils.errors import UserError

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(2, dtype=torch.bfloat16)}


@pytest.fixture
def folder(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


def test_infos_and_bytes(folder):
    weights = Weights(folder)
    assert {name: info.shape for name, info in weights.infos.items()} == {"b": (2, 3), "a": (2,)}
    assert weights.infos["a"].dtype == torch.bfloat16
    assert weights.nbytes == 24 + 4


def test_one_file_is_read_too(folder):
    assert torch.equal(Weights(folder / "model.safetensors").read("b"), TENSORS["b"])


def test_an_unknown_name_is_refused(folder):
    with pytest.raises(UserError, match="no tensor 'c'"):
        Weights(folder).read("c")


def test_what_is_read_outlives_the_file(folder):
    tensor = Weights(folder).read("b")
    (folder / "model.safetensors").write_bytes(b"")
    assert torch.equal(tensor, TENSORS["b"])


@pytest.mark.parametrize(
    "harm",
    {
        "truncated": lambda data: data[:-1],
        "too long": lambda data: data + b"0",
        "no header": lambda data: b"\0" * len(data),
        "empty": lambda data: b"",
        "unknown dtype": lambda data: data.replace(b'"F32"', b'"X32"'),
    }.items(),
    ids=lambda harm: harm[0],
)
def test_a_damaged_file_is_refused(harm, folder):
    file = folder / "model.safetensors"
    file.write_bytes(harm[1](file.read_bytes()))
    with pytest.raises(UserError, match="this file of weights is damaged"):
        Weights(folder)


def test_a_dtype_that_torch_lacks_is_named(folder):
    file = folder / "model.safetensors"
    data = file.read_bytes().replace(b'"BF16"', b'"F8_E8M0"').replace(b"[2]", b"[4]")
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length + 3].rstrip()  # three letters were added
    padded = header + b" " * (-len(header) % 8)
    file.write_bytes(len(padded).to_bytes(8, "little") + padded + data[8 + length + 3 :])
    with pytest.raises(UserError, match="F8_E8M0"):
        Weights(folder)


def test_bin_files_run_no_code(tmp_path):
    torch.save({"a": test_bin_files_run_no_code}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="damaged"):
        Weights(tmp_path)


def test_training_arguments_are_no_weights(tmp_path):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    torch.save({"x": torch.ones(1)}, tmp_path / "training_args.bin")
    assert set(Weights(tmp_path).infos) == {"a", "b"}


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match="no weights here"):
        Weights(tmp_path)


def index(folder, weight_map):
    file = folder / "model.safetensors.index.json"
    file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), "utf-8")


def test_a_shard_that_is_missing_is_named(folder):
    index(folder, {"a": "model.safetensors", "c": "model-2.safetensors"})
    with pytest.raises(UserError, match=r"shards are missing: model-2\.safetensors"):
        Weights(folder)


def test_a_tensor_that_no_shard_holds_is_named(folder):
    index(folder, {"a": "model.safetensors", "c": "model.safetensors"})
    with pytest.raises(UserError, match="no shard holds: c"):
        Weights(folder)


def test_an_index_that_is_no_index_is_refused(folder):
    (folder / "model.safetensors.index.json").write_text("[]", "utf-8")
    with pytest.raises(UserError, match="cannot be used"):
        Weights(folder)


def test_names_for_a_message():
    assert shown(["a", "b"]) == "a, b"
    assert shown("abcdefghij", 3) == "a, b, c and 7 more"
