"""Pairs of answers, batches of them, and models to train on them."""

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.nn.functional import log_softmax

from tests.helpers.tiny import make_model
from xtuner.dataset.collate_fns import preference_collate_fn
from xtuner.dataset.preference_dataset import build_preference_dataset
from xtuner.model.dpo import DPO

PAIRS = [
    ("What is the capital of France?", "The capital is Paris.", "I am 9 8 7."),
    ("Give three tips", "Eat well, sleep well, walk.", "no"),
    ("add", "return a + b", "return a - b, that is what I would do!"),
]
LORA = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def dataset(tokenizer, **settings):
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in PAIRS]
    return build_preference_dataset(
        Dataset.from_list(rows), tokenizer, max_length=128, shuffle_before_pack=False, **settings
    )


def batch(tokenizer, packed=False, **settings):
    made = dataset(tokenizer, use_varlen_attn=packed, max_packed_length=1024, **settings)
    return preference_collate_fn(list(made), use_varlen_attn=packed)["data"]


def model(kind=DPO, arch="llama", lora=False, seed=0, **settings):
    torch.manual_seed(seed)
    llm = make_model(arch)
    torch.manual_seed(1)
    return kind(llm, lora=LoraConfig(**LORA) if lora else None, **settings)


def moved(built):
    """The model with weights that are not those of the reference any more."""
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in built.parameters():
            if weight.requires_grad:
                weight.add_(0.02 * torch.randn_like(weight))
    return built


def plain_log_probs(llm, data):
    """(2 P,) sums and means by the textbook: all logits, one answer at a time."""
    sums, means = [], []
    for ids, labels, mask in zip(
        data["input_ids"], data["labels"], data["attention_mask"], strict=True
    ):
        length = int(mask.sum())
        logits = llm(input_ids=ids[None, :length]).logits[0, :-1].float()
        goal = labels[1:length]
        log_probs = log_softmax(logits, -1).gather(1, goal.clamp(min=0)[:, None])[:, 0]
        log_probs = log_probs[goal != -100]
        sums.append(log_probs.sum())
        means.append(log_probs.mean())
    return torch.stack(sums), torch.stack(means)


def with_dropout(p=0.5, **settings):
    """A model with an adapter that does something, and dropout in front of it."""
    torch.manual_seed(0)
    llm = make_model("llama")
    torch.manual_seed(1)
    return moved(DPO(llm, lora=LoraConfig(**LORA, lora_dropout=p), **settings))


def train(built, data, steps=25, lr=5e-3):
    optimizer = torch.optim.AdamW([w for w in built.parameters() if w.requires_grad], lr=lr)
    first = last = None
    for _ in range(steps):
        found = built(data)
        first, last = first or found, found
        optimizer.zero_grad()
        found["loss"].backward()
        optimizer.step()
    return first, last
