"""Writing weights a tensor at a time gives files that safetensors and torch read."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from xtuner.export.shards import ShardWriter, check_space, parse_size
from xtuner.export.weights import DTYPES, TensorInfo, Weights
from xtuner.utils.errors import UserError

TENSORS = {
    "odd": torch.arange(3, dtype=torch.uint8),
    "bf16": torch.randn(3, 5).to(torch.bfloat16),
    "fp32": torch.randn(7, 2).t(),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.zeros(0, 4),
    "flag": torch.tensor([True, False]),
}


def plan(tensors=TENSORS):
    return [TensorInfo(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]


def write(folder, size, safe=True, tensors=TENSORS):
    with ShardWriter(folder, plan(tensors), size, safe) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


@pytest.mark.parametrize("size", [10**9, 40, 1])
@pytest.mark.parametrize("safe", [True, False])
def test_round_trip(size, safe, tmp_path):
    write(tmp_path, size, safe)
    weights = Weights(tmp_path)
    for name, tensor in TENSORS.items():
        assert torch.equal(weights.read(name), tensor), name
        assert weights.infos[name].dtype == tensor.dtype
    if safe:
        merged = {}
        for file in tmp_path.glob("*.safetensors"):
            merged.update(load_file(file))
        assert all(torch.equal(merged[name], tensor) for name, tensor in TENSORS.items())
    assert (len(weights.files) == 1) == (size == 10**9)


def wide(tensor):
    return tensor.to(torch.complex128)  # torch compares not all dtypes as they are


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
def test_every_dtype(dtype, tmp_path):
    tensor = torch.ones(3, 2).to(dtype)
    write(tmp_path, 10**9, tensors={"one": tensor})
    read = load_file(tmp_path / "model.safetensors")["one"]
    assert read.dtype == dtype and torch.equal(wide(read), wide(tensor))
    ours = Weights(tmp_path).read("one")
    assert ours.dtype == dtype and torch.equal(wide(ours), wide(tensor))


def test_the_index_is_the_hubs(tmp_path):
    write(tmp_path, 40)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text("utf-8"))
    assert set(index["weight_map"]) == set(TENSORS)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file)


def test_shards_keep_to_their_size_but_for_a_larger_tensor(tmp_path):
    tensors = {"a": torch.zeros(4), "huge": torch.zeros(100), "b": torch.zeros(4)}
    write(tmp_path, 40, tensors=tensors)
    shards = [set(load_file(file)) for file in sorted(tmp_path.glob("*.safetensors"))]
    assert {"huge"} in shards and {"a", "b"} in shards


@pytest.mark.parametrize("safe", [True, False])
def test_tensors_may_come_in_any_order(safe, tmp_path):
    with ShardWriter(tmp_path, plan(), 40, safe) as writer:
        for name in reversed(TENSORS):
            writer.write(name, TENSORS[name])
    weights = Weights(tmp_path)
    assert all(torch.equal(weights.read(name), tensor) for name, tensor in TENSORS.items())


def test_a_planned_tensor_that_is_not_written_is_a_fault(tmp_path):
    with (
        pytest.raises(AssertionError, match="not written: odd"),
        ShardWriter(tmp_path, plan(), 10**9) as writer,
    ):
        for name in list(TENSORS)[1:]:
            writer.write(name, TENSORS[name])


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(4, dtype=torch.uint8)])
def test_a_tensor_that_is_not_as_planned_is_a_fault(wrong, tmp_path):
    with pytest.raises(AssertionError), ShardWriter(tmp_path, plan(), 10**9) as writer:
        writer.write("odd", wrong)


def test_an_error_while_writing_is_not_hidden_by_what_is_left(tmp_path):
    with pytest.raises(OSError, match="disk"), ShardWriter(tmp_path, plan(), 10**9) as writer:
        writer.write("odd", TENSORS["odd"])
        raise OSError("disk")


def test_sizes():
    assert parse_size("2GB") == 2 * 10**9
    assert parse_size("1 GiB") == 2**30
    assert parse_size("1.5mb") == 1_500_000
    for text in ("", "GB", "-1GB", "0GB", "2XB"):
        with pytest.raises(UserError, match="not a shard size"):
            parse_size(text)


def test_space_is_that_of_the_nearest_folder_that_exists(tmp_path):
    check_space(tmp_path / "new" / "newer", 1)
    with pytest.raises(UserError, match="this needs 1000000"):
        check_space(tmp_path / "new", 10**18)
