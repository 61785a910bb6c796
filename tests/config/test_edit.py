"""Editing config text by position: what is around stays, line numbers stay."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtuner.config.edit import with_imports, with_settings, with_value
from xtuner.config.load import load_source
from xtuner.config.source import ConfigSource

TEXT = """\
名 = '值'; lr = 2e-4  # 学习率
betas = [
    0.9,
    0.99,
]  # pair
opt = dict(a=dict(lr=lr, b=(1)), c={'d': 1})
empty = dict()
other = dict(x=opt)
"""


@pytest.mark.parametrize(
    ("path", "code", "line", "text"),
    [
        ("lr", "1", 1, "名 = '值'; lr = 1  # 学习率"),
        ("betas", "None", 2, "betas = None"),
        ("betas.1", "5", 4, "    5,"),
        ("opt.a.lr", "7", 6, "opt = dict(a=dict(lr=7, b=(1)), c={'d': 1})"),
        ("opt.a.b", "7", 6, "opt = dict(a=dict(lr=lr, b=(7)), c={'d': 1})"),
        ("opt.c.d", "7", 6, "opt = dict(a=dict(lr=lr, b=(1)), c={'d': 7})"),
        ("opt.a.new", "7", 6, "opt = dict(a=dict(new=7, lr=lr, b=(1)), c={'d': 1})"),
        ("opt.z.y", "7", 6, "opt = dict(z={'y': 7}, a=dict(lr=lr, b=(1)), c={'d': 1})"),
        ("empty.k", "7", 7, "empty = dict(k=7)"),
        ("other.x.q", "7", 8, "other = dict(x=dict(opt, q=7))"),
        ("other.x.a.lr", "7", 8, 'other = dict(x=dict(opt, a=dict(opt["a"], lr=7)))'),
        ("opt.c.e", "7", 9, "opt['c']['e'] = 7"),
        ("fresh", "7", 9, "fresh = 7"),
    ],
)
def test_with_value(path, code, line, text):
    source = ConfigSource(TEXT, "x.py")
    current = dict(load_source(source)._cfg_dict).get(path.split(".")[0])
    edited = with_value(source, path.split("."), code, current)
    lines = edited.text.splitlines()
    assert lines[line - 1] == text
    assert [a for a, b in zip(lines, TEXT.splitlines(), strict=False) if a == b]
    assert edited.tree.body[-1].lineno >= ConfigSource(TEXT, "x.py").tree.body[-1].lineno


def test_new_keyword_among_comments():
    text = "a = dict(  # first\n    # second\n    x=1,  # third\n)\n"
    edited = with_value(ConfigSource(text, "x.py"), ["a", "y"], "2", {"x": 1})
    assert load_source(edited).a == {"x": 1, "y": 2}
    assert edited.text.count("\n") == text.count("\n")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(value=values)
def test_any_plain_value_arrives(value):
    """Whatever is put in comes back out, on the lines that were there."""
    source = ConfigSource(TEXT, "x.py")
    edited = with_value(source, ["opt", "a", "lr"], repr(value), None)
    assert load_source(edited).opt.a["lr"] == value
    assert len(edited.text.splitlines()) >= len(TEXT.splitlines())


@pytest.mark.parametrize("odd", ["\u2028", "\x0c", "\x85"])
def test_odd_line_separators_do_not_shift_edits(odd):
    source = ConfigSource(f"a = '{odd}'\nlr = 1\nopt = dict(lr=lr)\n", "x.py")
    assert with_value(source, ["lr"], "2", None).text == source.text.replace("lr = 1", "lr = 2")
    with_import = with_imports(source, ["import torch"])
    assert with_import.lines[:3] == ["import torch", f"a = '{odd}'", "lr = 1"]


def test_imports_go_before_the_first_one():
    source = ConfigSource('"""Doc."""\nimport os\na = os\n', "x.py")
    assert with_imports(source, ["import torch"]).lines[:3] == [
        '"""Doc."""',
        "import torch",
        "import os",
    ]


def test_one_of_several_names_with_one_value():
    source = ConfigSource("a = b = 1\nc = [a, b]\n", "x.py")
    edited = with_value(source, ["a"], "7", None)
    assert load_source(edited).c == [7, 1]
    assert len(edited.lines) == len(source.lines)


@pytest.mark.parametrize("key", ["from", "class"])
def test_a_key_that_is_a_keyword_of_python(key):
    source = ConfigSource("a = dict(b=1)\n", "x.py")
    edited = with_value(source, ["a", key], "2", {"b": 1})
    assert load_source(edited).a == {"b": 1, key: 2}


def test_a_shared_dict_keeps_its_value_elsewhere():
    source = ConfigSource("base = dict(lr=1)\none = dict(opt=base)\ntwo = dict(opt=base)\n", "x.py")
    edited = with_value(source, ["one", "opt", "lr"], "5", {"opt": {"lr": 1}})
    config = load_source(edited)
    assert (config.one.opt.lr, config.two.opt.lr) == (5, 1)


def test_several_settings_are_replaced_in_one_pass():
    text = "a = 1; b = 2  # both\nif a:\n    a = 3\nc = d = [\n    4,\n]\n"
    codes = {"b": "20", "c": "30", "a": "'a longer one'", "e": "50"}
    edited = with_settings(ConfigSource(text, "c.py"), codes)
    found: dict[str, object] = {}
    exec(edited.text, {}, found)
    assert found == {"a": "a longer one", "b": 20, "c": 30, "d": [4], "e": 50}
    assert edited.text.splitlines()[0].endswith("# both")
