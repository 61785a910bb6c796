"""Names of dtypes in all their spellings."""

import pytest
import torch

from xtuner.utils.dtypes import DTYPE_NAMES, SHORT_NAMES, dtype_name, torch_dtype


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (torch.float16, "float16"),
        ("torch.bfloat16", "bfloat16"),
        ("fp16", "float16"),
        ("bf16", "bfloat16"),
        ("fp32", "float32"),
        ("half", "float16"),
        ("float64", "float64"),
        ("auto", "auto"),
    ],
)
def test_names(given, name):
    assert dtype_name(given) == name


def test_every_name_is_a_dtype_of_torch():
    for name in (*DTYPE_NAMES, *SHORT_NAMES):
        assert torch_dtype(name).is_floating_point
    assert torch_dtype("bf16") is torch.bfloat16


@pytest.mark.parametrize("name", ["int8", "float61", "auto", "Tensor"])
def test_what_is_no_dtype(name):
    with pytest.raises(ValueError, match="is no dtype"):
        torch_dtype(name)
