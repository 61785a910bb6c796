"""print-cfg --why: the lines that a value passes through."""

import pytest

from xtuner.config.provenance import provenance_of
from xtuner.utils.errors import UserError

NAME = "internlm2_chat_7b_qlora_alpaca_e3"


def test_chain():
    steps = provenance_of(NAME, "train_dataloader.dataset.max_length")
    assert [step.key for step in steps] == [
        "train_dataloader.dataset",
        "alpaca_en.max_length",
        "max_length",
    ]
    assert steps[-1].text == "2048"
    assert steps[0].line > steps[1].line > steps[2].line


def test_override_is_shown():
    last = provenance_of(NAME, "optim_wrapper.optimizer.lr", ["lr=1e-5"])[-1]
    assert (last.key, last.text) == ("lr", "1e-05")
    assert "--cfg-options" in last.note and "2e-4" in last.note


def test_computed_from():
    steps = provenance_of(NAME, "param_scheduler.0.end")
    assert [step.key for step in steps][1:] == ["warmup_ratio", "max_epochs"]


def test_unknown_key():
    with pytest.raises(UserError, match="weight_decay"):
        provenance_of(NAME, "optim_wrapper.weight_decay")
