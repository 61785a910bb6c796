"""print-cfg --why: the lines that a value passes through."""

import pytest

from xtuner.config.load import load
from xtuner.config.override import override
from xtuner.config.provenance import Origin, provenance_of
from xtuner.utils.errors import UserError

NAME = "internlm2_chat_7b_qlora_alpaca_e3"


def steps_of(key: str, *options: str) -> list[Origin]:
    return provenance_of(override(load(NAME), options), key)


def test_chain():
    steps = steps_of("train_dataloader.dataset.max_length")
    assert [step.key for step in steps] == [
        "train_dataloader.dataset",
        "alpaca_en.max_length",
        "max_length",
    ]
    assert steps[-1].text == "2048"
    assert steps[0].line > steps[1].line > steps[2].line


def test_override_is_shown():
    last = steps_of("optim_wrapper.optimizer.lr", "lr=1e-5")[-1]
    assert (last.key, last.text) == ("lr", "1e-05")
    assert "--cfg-options" in last.note and "2e-4" in last.note


def test_computed_from():
    steps = steps_of("param_scheduler.0.end")
    assert [step.key for step in steps][1:] == ["warmup_ratio", "max_epochs"]


def test_unknown_key():
    with pytest.raises(UserError, match="weight_decay"):
        steps_of("optim_wrapper.weight_decay")
