"""What ends an answer: template, tokenizer, the model's generation config and further words."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

from xtuner.chat import ChatPrompt, ChatSession
from xtuner.engine.hooks import EvaluateChatHook
from xtuner.tokenization.chat_template import answer_stops
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
    assert answer_stops(tokenizer) == ([eos], [])
    assert answer_stops(tokenizer, None, GenerationConfig(eos_token_id=[end, eos]))[0] == [eos, end]
    assert answer_stops(tokenizer, None, GenerationConfig(eos_token_id=end))[0] == [eos, end]
    assert answer_stops(tokenizer, None, GenerationConfig()) == ([eos], [])
    assert set(answer_stops(tokenizer, INTERNLM2)[0]) == {end, eos}
    assert answer_stops(tokenizer, extra=["two words"]) == ([eos], ["two words"])


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
