"""A session with a model that has learnt one answer by heart."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from xtuner.chat.prompt import ChatPrompt
from xtuner.chat.session import ChatSession, Sampling
from xtuner.utils.templates import PROMPT_TEMPLATE


@pytest.fixture
def session(answering_model: Path) -> ChatSession:
    model = AutoModelForCausalLM.from_pretrained(answering_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(answering_model)
    prompt = ChatPrompt(tokenizer, PROMPT_TEMPLATE.internlm2_chat)
    return ChatSession(model, prompt, sampling=Sampling(max_new_tokens=30, temperature=0))
