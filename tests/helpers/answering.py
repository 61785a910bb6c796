"""A tiny model that has learnt one answer by heart, to chat with in tests."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.helpers.tiny import make_model, make_tokenizer
from xtuner.chat.prompt import ChatPrompt, Turn
from xtuner.utils.templates import PROMPT_TEMPLATE

QUESTIONS = ("Please introduce yourself", "请做一下自我介绍")
ANSWER = "I am a small assistant."


def save_answering_model(folder: Path, template: str = "internlm2_chat", steps: int = 60) -> Path:
    """Save a model that answers every question with ``ANSWER`` and then ends its turn."""
    tokenizer = make_tokenizer()
    prompt = ChatPrompt(tokenizer, PROMPT_TEMPLATE[template])
    torch.manual_seed(0)
    model = make_model(max_position_embeddings=160)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    rows = []
    for question in QUESTIONS:
        start = prompt.ids([Turn(question)])
        whole = prompt.ids([Turn(question, ANSWER)])
        labels = [-100] * len(start) + whole[len(start) :]
        rows.append((torch.tensor([whole]), torch.tensor([labels])))
    for step in range(steps):
        ids, labels = rows[step % len(rows)]
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
