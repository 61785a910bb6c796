"""The tokenizer's own chat template: what it has is found, where serving differs is shown."""

from __future__ import annotations

import pytest

from tests.helpers.tiny import make_tokenizer
from tests.tokenization.test_messages import CUTS, FORGETS, MOVES, OPENS, SWITCHED
from xtuner.tokenization.chat_template import answer_stops
from xtuner.tokenization.template_check import PLAIN_PROBES, PROBES, Probe, check_own_template

CALLS = ["a tool call", "several calls in one answer", "calls one after the other"]
THOUGHTS = ["reasoning", "reasoning in several rounds"]
ALL = ["a system prompt", "tools", *CALLS, *THOUGHTS, "reasoning and tool calls"]


def checked(template, probes=PROBES, stops=None, **settings):
    tokenizer = make_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|end|>", "</think>"]})
    return check_own_template(tokenizer, stops or answer_stops(tokenizer)[0], probes, **settings)


def grave(found):
    """Differences, without answers that begin with spaces: served as history, they are cut anew."""
    return [str(each) for each in found.differences if not each.harmless]


@pytest.mark.parametrize(
    ("template", "features"),
    [
        (None, ["a system prompt"]),
        (FORGETS, ALL),
        (SWITCHED, ["enable_thinking", *ALL]),
        (OPENS, ["a system prompt", *THOUGHTS]),
        (CUTS, ["a system prompt", *THOUGHTS]),
        (MOVES, ["a system prompt"]),
    ],
)
def test_what_a_template_has_is_tried_and_agrees(template, features):
    found = checked(template)
    assert grave(found) == []
    assert found.supported == features
    assert set(found.unsupported) == {*ALL, "enable_thinking"} - set(features)


@pytest.mark.parametrize("thinking", ["mask_empty", "drop"])
@pytest.mark.parametrize("switch", [True, False])
def test_the_settings_of_the_training_are_those_of_serving(thinking, switch):
    found = checked(SWITCHED, arguments={"enable_thinking": switch}, thinking=thinking)
    assert not grave(found)


def test_a_template_whose_refusal_has_a_reason_gives_it():
    refuses = FORGETS.replace(
        "{%- if tools %}",
        "{%- if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        "{%- if tools %}",
    )
    found = checked(refuses)
    assert found.unsupported["a system prompt"] == "no system turn" and not grave(found)


def test_answers_that_generation_does_not_end_are_shown():
    found = checked(OPENS, stops=[1])
    assert "'<|end|>'" in str(found.differences[0])
    endless = OPENS.replace("<|end|>", "")
    assert "generation does not stop" in str(checked(endless, PLAIN_PROBES).differences[0])


def test_a_prompt_that_is_not_what_is_trained_is_shown_from_both_sides(monkeypatch):
    from xtuner.tokenization import template_check

    monkeypatch.setattr(template_check, "set_arguments", lambda tokenizer, arguments: None)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    probe = Probe("", talk, place="rows.jsonl:3")
    (shown,) = checked(SWITCHED, [probe], arguments={"enable_thinking": False}).differences[:1]
    text = str(shown)
    assert text.startswith("rows.jsonl:3 (enable_thinking=False): ")
    assert "assistant\\n<think>\\n\\n</think>" in shown.trained.__repr__()
    assert shown.served.endswith("assistant\n")
