"""Each card's architecture trains with its own recipe: adapters, dropout, packing, recomputation.

Stand-ins are tiny models of the card's ``model_type``, read from a folder as the hub has it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from scripts.models_page import KINDS, kind_of
from tests.helpers.architectures import MULTIMODAL, VOCABULARY, make_architecture, make_config
from tests.helpers.tiers import few_fast
from xtuner.config import load_config
from xtuner.configs.models import MODELS
from xtuner.dataset.collate_fns import default_collate_fn
from xtuner.model.modules import attention
from xtuner.model.probe import ensure_exact_rows
from xtuner.model.sft import SupervisedFinetune
from xtuner.model.transformers_models.auto import FAMILIES
from xtuner.registry import BUILDER

LENGTHS = (7, 9, 5)
METHOD = "lora"
NOT_ADAPTED = ("router", "experts", "vision", "visual", "lm_head")
# The last layers take keys and values of earlier ones.
SHARED_KEYS: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
# Cards of one model_type whose layers differ from those of its first card.
VARIANTS: dict[str, dict[str, Any]] = {
    "gemma4_e2b_it": SHARED_KEYS,
    "gemma4_26b_a4b_it": {
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
    "gemma4_31b_it": {
        "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
    },
    "llama4_scout_instruct": {"attention_chunk_size": 16},
    "granite4_micro": {"layer_types": ["attention"] * 2, "num_local_experts": 0},
    "nemotron3_nano_4b": {"layers_block_type": ["mlp", "mamba", "attention"]},
    "nemotron3_nano_30b_a3b": {"layers_block_type": ["moe", "mamba", "attention"]},
}


def cards_of_kinds() -> list[str]:
    """The first card of each architecture that transformers computes, and the variants."""
    first: dict[str, str] = {}
    for card in MODELS.values():
        if METHOD not in card.unsupported:
            first.setdefault(kind_of(card.path).model_type, card.name)
    ours = [kind.model_type for kind in KINDS if kind.model_type in FAMILIES]
    return [name for kind, name in first.items() if kind not in ours and name not in VARIANTS] + [
        *VARIANTS
    ]


def samples() -> list[dict[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(1)
    rows = [torch.randint(VOCABULARY, (length,), generator=random) for length in LENGTHS]
    return [{"input_ids": row, "labels": row} for row in rows]


@pytest.mark.parametrize("name", few_fast(cards_of_kinds(), cards_of_kinds()[::5]))
def test_two_steps_of_its_recipe(name, tmp_path):
    kind = kind_of(MODELS[name].path).model_type
    if kind == "gemma3n":
        pytest.importorskip("timm", reason="its vision tower is a model of timm")
    torch.manual_seed(0)
    auto = AutoModelForImageTextToText if kind in MULTIMODAL else AutoModelForCausalLM
    config = make_config(kind, **VARIANTS.get(name, {}))
    plain = auto.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    plain.save_pretrained(tmp_path)
    cfg = load_config(
        f"{name}_{METHOD}_custom_sft_e1", [f"pretrained_model_name_or_path={tmp_path}"]
    )
    cfg.model.llm.dtype = torch.float32
    model = BUILDER.build(cfg.model)
    assert model.use_varlen_attn and model.causal_lm.is_gradient_checkpointing
    trained = {key: weight for key, weight in model.named_parameters() if weight.requires_grad}
    assert trained
    if "lora_targets" not in MODELS[name].settings:
        # Gemma 3n's modality_router chooses no experts: it is one of its mixing layers
        names = [key.replace("modality_router", "") for key in trained]
        assert not any(word in name for name in names for word in NOT_ADAPTED)

    rows = samples()
    packed = default_collate_fn(rows, use_varlen_attn=True)["data"]
    total = {"tokens": sum(LENGTHS) - len(LENGTHS)}
    with torch.no_grad():
        loss = float(model.eval()(packed, mode="loss", num_items_in_batch=total)["loss"])
        alone = [
            plain(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss
            * (len(row["labels"]) - 1)
            for row in rows
        ]
    assert loss == pytest.approx(float(sum(alone)) / total["tokens"], rel=1e-5)

    model.train()
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        share = model(packed, mode="loss", num_items_in_batch=total)["loss"]
        share.backward()
        assert all(weight.grad is not None for weight in trained.values())
        optimizer.step()
        losses.append(float(share.detach()))
    assert losses[1] < losses[0]


def test_padded_rows_of_layers_with_shared_keys_take_eager_attention():
    """What docs/en/models.md says of Gemma 4 E2B and E4B."""
    llm = make_architecture("gemma4", attention=attention.register(), **SHARED_KEYS)
    model = SupervisedFinetune(llm).eval()
    ensure_exact_rows(llm, model.hidden_states, packed=True, padded=False)
    assert llm.config._attn_implementation == attention.NAME
    ensure_exact_rows(llm, model.hidden_states, packed=False, padded=True)
    assert llm.config._attn_implementation == "eager"
