"""What ends an answer: template, tokenizer, the model's generation config and further words."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

from tests.helpers.hub_layouts import write_tokenizer as write_hub_tokenizer
from tests.helpers.tiny import CHAT_TEMPLATE, make_tokenizer
from xtuner.chat import ChatPrompt, ChatSession
from xtuner.engine.hooks import EvaluateChatHook
from xtuner.export.sidecar_files import write_tokenizer
from xtuner.model.transformers_models.auto import AutoTokenizer
from xtuner.tokenization import rendering
from xtuner.tokenization.chat_template import answer_stops, turn_end_ids
from xtuner.utils.templates import PROMPT_TEMPLATE

INTERNLM2 = PROMPT_TEMPLATE.internlm2_chat


@pytest.fixture(scope="module")
def end(tokenizer):
    """The id of the template's end, which is not the tokenizer's eos."""
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end != tokenizer.eos_token_id
    return end


def test_every_source_counts(tokenizer, end):
    eos = tokenizer.eos_token_id
    assert answer_stops(tokenizer) == ([eos, end], [])  # the chat template ends answers so
    plain = make_tokenizer(chat_template=None)
    assert answer_stops(plain) == ([eos], [])
    assert answer_stops(plain, None, GenerationConfig(eos_token_id=[end, eos]))[0] == [eos, end]
    assert answer_stops(plain, None, GenerationConfig(eos_token_id=end))[0] == [eos, end]
    assert answer_stops(plain, None, GenerationConfig()) == ([eos], [])
    assert set(answer_stops(tokenizer, INTERNLM2)[0]) == {end, eos}
    assert answer_stops(plain, extra=["two words"]) == ([eos], ["two words"])


TURN_ENDS = {
    "none": (None, []),
    "a text": ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", []),
    "a special token": (CHAT_TEMPLATE, ["<|im_end|>"]),
    "a space before it": ("{% for m in messages %}{{ m.content }} </s>{% endfor %}", ["</s>"]),
    "the next turn's role": ("{% for m in messages %}<s>{{ m.content }}{% endfor %}", ["<s>"]),
    "two turns refused": ("{% if messages|length > 1 %}{{ raise() }}{% endif %}", []),
}


@pytest.mark.parametrize(("template", "ends"), TURN_ENDS.values(), ids=TURN_ENDS)
def test_the_chat_template_says_what_ends_a_turn(template, ends):
    own = make_tokenizer(chat_template=template)
    assert own.convert_ids_to_tokens(turn_end_ids(own)) == ends


def test_an_export_stops_at_the_end_of_a_turn(tokenizer, end, tmp_path):
    eos = tokenizer.eos_token_id
    file = tmp_path / "generation_config.json"
    file.write_text('{"eos_token_id": 7}')
    write_tokenizer(tmp_path, tokenizer, None)
    assert json.loads(file.read_text())["eos_token_id"] == [eos, end, 7]
    plain = tmp_path / "plain"
    plain.mkdir()
    write_tokenizer(plain, make_tokenizer(chat_template=None), None)
    assert not (plain / "generation_config.json").exists()


class _Model:
    """Answers with one token, the template's end, and then noise, unless it is told to stop."""

    device = torch.device("cpu")

    def __init__(self, end: int) -> None:
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
        self.generation_config = GenerationConfig(eos_token_id=[end, 1])
        self.end = end

    def generate(self, input_ids, eos_token_id, **settings):
        answer = [20, self.end, 21, 22, 23]
        stop = next(n for n, each in enumerate(answer) if each in eos_token_id)
        return torch.tensor([[*input_ids[0].tolist(), *answer[: stop + 1]]])


def test_a_session_from_python_stops(tokenizer, end):
    session = ChatSession(_Model(end), ChatPrompt(tokenizer))
    assert session.ask("Hi") == tokenizer.decode([20]).strip()


def test_sample_outputs_while_training_stop(tokenizer, end):
    hook = EvaluateChatHook(tokenizer, ["Hi"], prompt_template=PROMPT_TEMPLATE.auto)
    model = SimpleNamespace(llm=_Model(end), generate=_Model(end).generate)
    text = hook._answer(model, torch.device("cpu"), 0, 600)
    assert text.endswith("<|im_end|>") and tokenizer.decode([21]) not in text[-1:]


@pytest.mark.parametrize("family", ["internlm2", "internlm3", "internvl", "deepseek"])
def test_folders_of_the_hub_end_their_turns(tmp_path, family):
    write_hub_tokenizer(tmp_path, family)
    own = AutoTokenizer.from_pretrained(tmp_path)
    end = "<｜end▁of▁sentence｜>" if family == "deepseek" else "<|im_end|>"
    assert own.convert_ids_to_tokens(turn_end_ids(own)) == [end]


def test_a_template_that_does_not_end_holds_nothing_up(monkeypatch):
    monkeypatch.setattr(rendering, "TEMPLATE_SECONDS", 1)
    endless = "{% if messages|length > 1 %}{% for i in range(10**9) %}{% endfor %}{% endif %}"
    own = make_tokenizer(chat_template=endless)
    assert ChatPrompt(own).stops() == ([own.eos_token_id], [])
