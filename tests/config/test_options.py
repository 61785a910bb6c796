"""Reading the words of --cfg-options: values, short keys, what is refused and what is suggested."""

from __future__ import annotations

import pytest

from xtuner.config.document import ConfigDocument
from xtuner.config.load import load_source
from xtuner.config.options import parse_options, read_value, suggest
from xtuner.config.source import ConfigSource
from xtuner.utils.errors import UserError


def document(text: str) -> ConfigDocument:
    source = ConfigSource("import torch\nfrom torch.optim import AdamW\n" + text, "x.py")
    config = load_source(source)
    return ConfigDocument(source, config, source, config)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("-3", -3),
        ("true", True),
        ("False", False),
        ("null", None),
        ("None", None),
        ("'1'", "1"),
        ("[1, 'a', None]", [1, "a", None]),
        ("(0.9,)", (0.9,)),
        ("{'a': {'b': 1}}", {"a": {"b": 1}}),
        ("dict(a=1, b=[true])", {"a": 1, "b": [True]}),
        ("a b=c", "a b=c"),
        ("x", "x"),
        ("[a, b]", ["a", "b"]),
        ("torch.float16", "float16"),
        ("", ""),
        ("1 + 1", "1 + 1"),
        ("f(1)", "f(1)"),
        ("/a-b/c.d", "/a-b/c.d"),
        ("1e999", float("inf")),
    ],
)
def test_values(text, value):
    code, read, is_code = read_value(text, set())
    assert (read, is_code) == (value, False)
    assert eval(code) == value


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("AdamW", "AdamW"),
        ("torch.bfloat16", "torch.bfloat16"),
        ("[AdamW, 1]", "[AdamW, 1]"),
        ("dict(type=AdamW, lr=1)", "{'type': AdamW, 'lr': 1}"),
    ],
)
def test_imported_names_are_code(text, code):
    assert read_value(text, {"AdamW", "torch"}) == (code, None, True)


@pytest.mark.parametrize(
    "text",
    [
        *("__import__('os').getcwd()", "[x for x in 'ab']", "lambda: 1"),
        *("AdamW()", "AdamW.x[0]", "f'{1}'"),
    ],
)
def test_nothing_else_is_code(text):
    """It stays text, imported names in it or not."""
    code, value, is_code = read_value(text, {"AdamW"})
    assert (code, value, is_code) == (repr(text), text, False)


def test_a_short_key_means_all_its_places():
    text = """
model = dict(llm=dict(pretrained_model_name_or_path='a'))
tokenizer = dict(pretrained_model_name_or_path='a')
"""
    (option,) = parse_options(["model.pretrained=/b"], document(text))
    assert [".".join(path) for path in option.paths] == [
        "model.llm.pretrained_model_name_or_path",
        "tokenizer.pretrained_model_name_or_path",
    ]
    (option,) = parse_options(["model.pretrained=/b"], document(text + "path = 'a'\n"))
    assert option.paths == (("path",),)


def test_the_optimizer_goes_through_its_setting():
    text = "lr = 1\noptim_wrapper = dict(optimizer=dict(lr=lr, eps=1e-8))\n"
    options = parse_options(["optimizer.lr=2", "optimizer.eps=1e-6"], document(text))
    assert [option.paths for option in options] == [
        (("lr",),),
        (("optim_wrapper", "optimizer", "eps"),),
    ]


def test_a_name_made_of_digits_stays_text():
    (option,) = parse_options(["path=42"], document("path = 'a'\n"))
    assert option.value == "42"
    (option,) = parse_options(["count=42"], document("count = 1\n"))
    assert option.value == 42


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("a.b.c=1", "there is nothing inside it"),
        ("a.z=1", "there is no key 'a.z'"),
        ("nothing=1", "there is no key 'nothing'"),
        ("n=x1", "expected a number like 3"),
        ("a=", None),
        ("n", "is not KEY=VALUE"),
    ],
)
def test_refused(word, message):
    given = document("n = 3\na = dict(b=1)\n")
    if message is None:
        parse_options([word], given)
        return
    with pytest.raises(UserError, match="--cfg-options") as error:
        parse_options([word], given)
    assert message in str(error.value)


def test_a_section_may_be_new_and_none_may_become_a_dict():
    given = document("model = dict(lora=None)\n")
    new, inside = parse_options(["randomness.seed=1", "model.lora.r=8"], given)
    assert new.paths == (("randomness", "seed"),) and inside.value == 8
    with pytest.raises(UserError, match=r"'randomness\.seed'"):
        parse_options(["randomness.sed=1"], document("randomness = dict(seed=1)\n"))


@pytest.mark.parametrize(
    ("key", "config", "suggested"),
    [
        ("epochs", {"max_epochs": 1}, "'max_epochs'"),
        ("epochs", {"other": 1}, ""),
        ("batchsize", {"batch_size": 1}, "'batch_size'"),
        ("lr", {"opt": {"lr": 1}, "b": [{"lr": 2}]}, "'opt.lr' / 'b.0.lr'"),
        ("zzz", {"a": 1}, ""),
    ],
)
def test_suggestions(key, config, suggested):
    assert suggest(key, (key,), config, config) == suggested


def test_suggestions_for_a_list():
    assert suggest("a.7", ("a", "7"), [1, 2, 3], {"a": [1, 2, 3]}) == "'a.0' ... 'a.2'"
