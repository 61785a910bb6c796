"""Every published preference config builds on a tiny stand-in and takes a step."""

import json

import pytest
import torch

from tests.helpers.hub_models import save_hub_model
from tests.helpers.tiers import few_fast
from tests.helpers.tiny import save_tiny
from xtuner import configs
from xtuner.config import load_config
from xtuner.dataset.preference_dataset import load_jsonl_dataset
from xtuner.registry import BUILDER

NAMES = [
    name
    for name in configs.names()
    if name.startswith(("internlm2_chat_", "llama3_8b_instruct_", "minicpm_"))
    and any(f"_{kind}_" in name for kind in ("dpo", "orpo", "reward"))
]


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preference")
    rows = [
        {
            "chosen": [{"role": "user", "content": q}, {"role": "assistant", "content": a}],
            "rejected": [{"role": "user", "content": q}, {"role": "assistant", "content": b}],
        }
        for q, a, b in [("hello", "yes", "no"), ("Give three tips", "walk", "I will not")]
    ]
    rows = [{"prompt": row["chosen"][:1], **row} for row in rows]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    bases = {"internlm": save_hub_model(folder / "internlm2", "internlm2_5")}
    return bases, str(save_tiny(folder / "base")), str(data)


def test_the_published_ones_are_among_them():
    assert len(NAMES) >= 17


@pytest.mark.parametrize("name", few_fast(NAMES, NAMES[::4]))
def test_it_takes_a_step(name, stand_in):
    bases, other, data = stand_in
    base = next((folder for kind, folder in bases.items() if name.startswith(kind)), other)
    options = [f"pretrained_model_name_or_path={base}", "max_length=128"]
    if "_reward_" in name:
        options.append("reward_token_id=2")
    cfg = load_config(name, options)
    loader = cfg.train_dataloader
    loader.dataset.dataset = dict(type=load_jsonl_dataset, data_files=data)
    dataset = BUILDER.build(loader.dataset)
    collate = {key: value for key, value in loader.collate_fn.items() if key != "type"}
    batch = loader.collate_fn.type(list(dataset), **collate)
    torch.manual_seed(0)
    model = BUILDER.build(cfg.model)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(**batch)
    found["loss"].backward()
    assert torch.isfinite(found["loss"])
    assert {"chosen_rewards", "rejected_rewards", "reward_acc", "reward_margin"} <= set(found)
    assert any(weight.grad is not None and weight.grad.any() for weight in model.parameters())
