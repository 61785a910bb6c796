"""Writing weights a tensor at a time gives files that safetensors and torch read."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from xtuner.export.shards import ShardWriter, TensorInfo, Weights, parse_size
from xtuner.utils.errors import UserError

TENSORS = {
    "odd": torch.arange(3, dtype=torch.uint8),
    "bf16": torch.randn(3, 5).to(torch.bfloat16),
    "fp32": torch.randn(7, 2).t(),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.zeros(0, 4),
    "flag": torch.tensor([True, False]),
}


def write(folder, size, safe=True):
    plan = [TensorInfo(name, tuple(t.shape), t.dtype) for name, t in TENSORS.items()]
    with ShardWriter(folder, plan, size, safe) as writer:
        for name, tensor in TENSORS.items():
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


def test_sizes():
    assert parse_size("2GB") == 2 * 10**9
    assert parse_size("1 GiB") == 2**30
    assert parse_size("1.5mb") == 1_500_000
    for text in ("", "GB", "-1GB", "0GB", "2XB"):
        with pytest.raises(UserError, match="not a size"):
            parse_size(text)
