"""Rules about imported names and the arguments of what they name."""

from __future__ import annotations

import pytest

from tests.config.check.rules import findings, keys
from xtuner.config.check import calls


def test_names_that_do_not_exist():
    text = "from torch.optim import AdamV\nfrom torch.optimm import SGD\nimport no_such_package\n"
    found = findings(calls.unknown_import, text)
    assert [finding.key for finding in found] == ["AdamV", "SGD", "no_such_package"]
    # an unknown name may be anybody's on PyPI: no hint says to install it
    assert "no_such_package.py" in found[-1].hint and "pip install" not in found[-1].hint
    (known,) = findings(calls.unknown_import, "import swanlab\n")
    assert known.hint == "pip install swanlab"


def test_an_attribute_that_does_not_exist():
    text = "tokenizer = dict(type=AutoTokenizer.from_pretraind)\na = torch.bfloat61\n"
    assert keys(calls.unknown_import, text) == ["a", "tokenizer.type"]


def test_packages_that_only_some_have(monkeypatch):
    from xtuner.config import names

    def find_spec(name: str, *rest: object) -> None:
        return None

    monkeypatch.setattr(names.importlib.util, "find_spec", find_spec)
    names.module_file.cache_clear()
    names.find.cache_clear()
    try:
        text = "from lagent.agents import ReAct\n"
        assert "ReAct" in keys(calls.missing_optional_package, text)
        assert "ReAct" not in keys(calls.unknown_import, text)
    finally:
        names.module_file.cache_clear()
        names.find.cache_clear()


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ("type=AdamW, lr=1, weight_deca=0", ["optim_wrapper.optimizer.weight_deca"]),
        ("type=AdamW, lr=1, _scope_='x'", []),
        ("type='AdamW', anything=1", []),  # only its registry knows it
    ],
)
def test_unknown_arguments(settings, wrong):
    found = findings(calls.unknown_argument, f"optim_wrapper = dict(optimizer=dict({settings}))")
    assert [finding.key for finding in found] == wrong
    assert all("weight_decay" in finding.hint and finding.at_key for finding in found)


def test_arguments_that_builders_add_or_take():
    """The optimizer's parameters and the schedulers' ``convert_to_iter_based``, for example."""
    text = """
optim_wrapper = dict(optimizer=dict(type=AdamW, lr=1))
param_scheduler = [dict(type=LinearLR, start_factor=1e-5, convert_to_iter_based=True)]
"""
    assert not keys(calls.missing_argument, text)
    assert not keys(calls.unknown_argument, text)


def test_missing_arguments():
    (found,) = findings(calls.missing_argument, "other = dict(type=template_map_fn_factory)")
    assert found.key == "other.type" and "'template'" in found.message


def test_published_arguments_are_no_mistakes():
    text = "data = dict(type=load_dataset, path='p', ignore_verifications=True, pth='x')"
    assert keys(calls.unknown_argument, text) == []  # load_dataset has **config_kwargs
    assert keys(calls.likely_misspelt_argument, text) == ["data.pth"]


def test_a_misspelt_argument_that_a_callee_swallows():
    text = "llm = dict(type=AutoModelForCausalLM.from_pretrained, trust_remote_cod=True)"
    (found,) = findings(calls.likely_misspelt_argument, text)
    assert found.key == "llm.trust_remote_cod" and "trust_remote_code" in found.hint


@pytest.mark.parametrize(
    ("template", "wrong"),
    [("qwen_chat", False), ("qwen_chatt", True), ("auto", False), ("qwen_chat.SYSTEM", False)],
)
def test_templates(template, wrong):
    found = findings(calls.unknown_template, f"prompt_template = PROMPT_TEMPLATE.{template}")
    assert bool(found) is wrong
    assert all("qwen_chat" in finding.hint for finding in found)


def test_lambdas_of_a_config_cannot_call_its_imports():
    text = """
wrong = lambda row: load_dataset(row)
also_right = lambda row: dict(row)
def right(row):
    return load_dataset(row)
"""
    (found,) = findings(calls.lambda_uses_lazy_import, text)
    assert found.key == "wrong" and "load_dataset" in found.message
