"""Arguments that commands share mean the same in each of them."""

from __future__ import annotations

import argparse
import importlib

import pytest

WITH_OPTIONS = (
    *("train", "test", "print_cfg", "check_cfg", "check_custom_dataset", "log_dataset"),
    *("data_preprocess.sft", "model_converters.pth_to_hf"),
)


def parser_of(module: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    importlib.import_module(f"xtuner.tools.{module}").add_arguments(parser)
    return parser


@pytest.mark.parametrize("module", WITH_OPTIONS)
def test_config_options_add_up(module):
    (action,) = [a for a in parser_of(module)._actions if a.dest == "cfg_options"]
    parser = argparse.ArgumentParser()
    parser._add_action(action)
    words = ["--cfg-options", "a=1", "b=2", "--cfg-options", "c=3"]
    assert parser.parse_args(words).cfg_options == ["a=1", "b=2", "c=3"]
    assert parser.parse_args([]).cfg_options == []


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("chat", "torch_dtype"),
        ("model_converters.llava", "torch_dtype"),
        ("model_converters.merge", "dtype"),
        ("model_converters.pth_to_hf", "dtype"),
    ],
)
def test_dtypes(module, name):
    (action,) = [a for a in parser_of(module)._actions if a.dest == name]
    assert set(action.choices) == {"auto", "fp32", "fp16", "bf16"}
    assert action.default == "auto" and action.help


@pytest.mark.parametrize("module", ["llava", "phi_to_llama", "merge", "pth_to_hf"])
def test_shard_sizes(module):
    (action,) = [
        a for a in parser_of(f"model_converters.{module}")._actions if a.dest == "max_shard_size"
    ]
    assert action.default == "2GB"
