"""Editing config text by position: what is around stays, line numbers stay."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtuner.config.load import load_source
from xtuner.config.source import Source

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
    source = Source(TEXT, "x.py")
    current = dict(load_source(source)._cfg_dict).get(path.split(".")[0])
    edited = source.with_value(path.split("."), code, current)
    lines = edited.text.splitlines()
    assert lines[line - 1] == text
    assert [a for a, b in zip(lines, TEXT.splitlines(), strict=False) if a == b]
    assert edited.tree.body[-1].lineno >= Source(TEXT, "x.py").tree.body[-1].lineno


def test_new_keyword_among_comments():
    text = "a = dict(  # first\n    # second\n    x=1,  # third\n)\n"
    edited = Source(text, "x.py").with_value(["a", "y"], "2", {"x": 1})
    assert load_source(edited).a == {"x": 1, "y": 2}
    assert edited.text.count("\n") == text.count("\n")


def test_trace_follows_names():
    text = "n = 3\nlr = n\nbase = dict(lr=lr)\nopt = dict(inner=dict(base, k=1))\n"
    source = Source(text, "x.py")
    assert [(s.line, s.key) for s in source.trace(["opt", "inner", "lr"])] == [
        (4, "opt.inner"),
        (3, "base.lr"),
        (2, "lr"),
        (1, "n"),
    ]
    assert source.trace(["no"]) == []
    assert source.place(["opt", "inner", "lr"]) == (1, 5)
    assert source.key_place(["opt", "inner", "lr"]) == (3, 13)


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
    source = Source(TEXT, "x.py")
    edited = source.with_value(["opt", "a", "lr"], repr(value), None)
    assert load_source(edited).opt.a["lr"] == value
    assert len(edited.text.splitlines()) >= len(TEXT.splitlines())
