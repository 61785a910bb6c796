"""Values of a loaded config: nothing is imported by looking at them."""

from __future__ import annotations

import sys

import pytest
from mmengine.config.lazy import LazyAttr, LazyObject

from xtuner.config.load import load_source
from xtuner.config.source import ConfigSource
from xtuner.config.values import (
    MISSING,
    copy_config,
    dotted_name,
    has_key,
    is_argument_name,
    is_imported,
    is_local_function,
    is_number,
    item_of,
    iter_dicts,
    iter_keys,
    last_name,
    name_of,
    own_values,
    value_at,
)

TEXT = """
import math
from not_installed_here import nothing
import neither_installed.inner as inner
def double(x):
    return 2 * x
a = dict(b=[1, dict(c=2, t=nothing)], f=double, g=inner.some.thing)
"""


@pytest.fixture
def config():
    return load_source(ConfigSource(TEXT, "x.py"))


def test_own_values_are_what_the_file_defines(config):
    assert set(own_values(config)) == {"a"}
    assert "not_installed_here" not in sys.modules


def test_items(config):
    values = own_values(config)
    assert value_at(values, ["a", "b", "1", "c"]) == 2
    assert is_imported(value_at(values, ["a", "b", "1", "t"]))
    for path in (["a", "z"], ["a", "b", "2"], ["a", "b", "x"], ["a", "b", "0", "c"]):
        assert not has_key(values, path)
        with pytest.raises(KeyError):
            value_at(values, path)
    assert item_of([1], "1") is MISSING and item_of(3, "x") is MISSING


def test_dicts_and_keys(config):
    values = own_values(config)
    assert [key for key, _ in iter_dicts(values["a"], "a")] == ["a", "a.b.1"]
    assert [key for key, _ in iter_dicts({"x": [{}]})] == ["", "x.0"]
    assert list(iter_keys({"a": values["a"]}))[:6] == [
        *("a", "a.b", "a.b.0", "a.b.1", "a.b.1.c", "a.b.1.t")
    ]


def test_a_copy_can_be_changed_alone(config):
    copied = copy_config(config)
    copied.a.b[1].c = 9
    copied.a.b.append(3)
    copied.new = 1
    assert (config.a.b[1].c, len(config.a.b), "new" in config) == (2, 2, False)
    assert copied.filename == config.filename
    assert is_imported(value_at(own_values(copied), ["a", "b", "1", "t"]))
    assert set(own_values(copied)) == {"a", "new"}


class Outer:
    class Inner:
        pass

    @classmethod
    def make(cls):
        return cls()


def named_things():
    import torch

    lazy = LazyObject("torch")
    yield LazyObject("torch.optim", "AdamW"), ("torch.optim", "AdamW"), "AdamW", "AdamW"
    yield lazy, ("torch", ""), "", ""
    yield LazyAttr("b", LazyAttr("a", lazy)), ("torch", "", "a.b"), "a.b", "b"
    yield torch.optim.AdamW, ("torch.optim.adamw", "AdamW"), "AdamW", "AdamW"
    yield torch.bfloat16, ("torch", "", "bfloat16"), "bfloat16", "bfloat16"
    yield Outer.make, (__name__, "Outer", "make"), "Outer.make", "make"
    yield Outer.Inner, (__name__, "Outer", "Inner"), "Outer.Inner", "Inner"
    yield len, ("builtins", "len"), "len", "len"


@pytest.mark.parametrize(
    ("value", "dotted", "name", "last"), list(named_things()), ids=lambda v: str(v)[:30]
)
def test_names(value, dotted, name, last):
    assert dotted_name(value) == dotted
    assert (name_of(value), last_name(value)) == (name, last)


@pytest.mark.parametrize("value", [None, 1, "text", 1.5, True, [1], {"a": 1}, b"x"])
def test_plain_data_has_no_import(value):
    assert dotted_name(value) is None


def test_registered_names():
    assert name_of("mmengine.AdamW") == last_name("mmengine.AdamW") == "AdamW"


def test_local_functions(config):
    assert is_local_function(eval("lambda row: row", {}))
    assert not is_local_function(len) and not is_local_function(Outer)


@pytest.mark.parametrize(
    ("key", "fits"), [("a", True), ("from", False), ("a-b", False), (1, False), ("", False)]
)
def test_argument_names(key, fits):
    assert is_argument_name(key) is fits


def test_numbers():
    assert is_number(1) and is_number(0.5)
    assert not is_number(True) and not is_number("1") and not is_number(None)
