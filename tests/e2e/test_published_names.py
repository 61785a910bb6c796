"""Each published config's model builds on a folder of its family: one name per family and method.

The names of LLaVA and InternVL are walked in the tests of these models.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.hub_layouts import LAYOUTS, write_tokenizer
from tests.helpers.tiers import few_fast
from tests.helpers.tiny import make_tokenizer
from xtuner.config import load_config
from xtuner.configs import describe
from xtuner.model.transformers_models.auto import AutoConfig, AutoModelForCausalLM
from xtuner.registry import BUILDER

NAMES = (Path(__file__).parents[1] / "golden/published_config_names.txt").read_text().split()
SIZES = {
    "vocab_size": 704,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2}
EXPERTS = {"moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2}
EXPERTS |= {"n_shared_experts": 2, "first_k_dense_replace": 1}
LATENT = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 64, "beta_fast": 32}
YARN |= {"beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707}
ALIBI = {"max_position_embeddings": None, "model_max_length": 256}
CHATGLM = {
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "kv_channels": 8,
    "add_qkv_bias": True,
}
FOLDERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    r"internlm/internlm-": ("internlm", "internlm", {"bias": True}),
    r"internlm/internlm2": ("internlm2", "internlm2", {"bias": False, **GROUPED}),
    r"THUDM/chatglm2": ("chatglm", "chatglm2", CHATGLM),
    r"THUDM/chatglm3": ("chatglm", "chatglm3", CHATGLM),
    r"Qwen/Qwen-": ("qwen", "qwen", {"seq_length": 256}),
    r"Qwen/Qwen1.5-MoE": ("qwen2_moe", "", {"num_experts": 4, **GROUPED}),
    r"Qwen/Qwen1.5": ("qwen2", "", GROUPED),
    r"baichuan-inc/Baichuan-7B": ("baichuan", "baichuan", {}),
    r"baichuan-inc/Baichuan-13B": ("baichuan", "baichuan", ALIBI),
    r"baichuan-inc/Baichuan2-7B": ("baichuan", "baichuan2", {"vocab_size": 125696}),
    r"baichuan-inc/Baichuan2-13B": ("baichuan", "baichuan2", {"vocab_size": 125696, **ALIBI}),
    r"openbmb/MiniCPM-": ("minicpm", "minicpm", {"scale_emb": 12, "dim_model_base": 16}),
    r"deepseek-ai/deepseek-moe": ("deepseek", "deepseek", EXPERTS),
    r"deepseek-ai/DeepSeek-V2": (
        "deepseek_v2",
        "deepseek",
        {**EXPERTS, **LATENT, "v_head_dim": 8, "rope_scaling": YARN},
    ),
    r"mistralai/Mixtral": ("mixtral", "", {"num_local_experts": 4, **GROUPED}),
    r"mistralai/|HuggingFaceH4/": ("mistral", "", GROUPED),
    r"google/gemma": ("gemma", "", {"head_dim": 8, "num_key_value_heads": 1}),
    r"CohereForAI/": ("cohere", "", GROUPED),
    r"microsoft/Phi-3": ("phi3", "", GROUPED),
    r"bigcode/starcoder": ("gpt_bigcode", "", {}),
    r".*": ("llama", "", GROUPED),
}
"""Hub path -> ``model_type``, tokenizer layout, and the fields of ``config.json``."""


def family_of(name: str) -> str:
    path = describe(name)["path"]
    return next(pattern for pattern in FOLDERS if re.match(pattern, path))


def one_of_each() -> dict[tuple[str, str], str]:
    found: dict[tuple[str, str], str] = {}
    for name in NAMES:
        if not name.startswith(("llava_", "internvl_")):
            found.setdefault((family_of(name), describe(name)["method"]), name)
    return found


NAMES = [*one_of_each().values()]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Family -> its folder, written once."""
    written: dict[str, Path] = {}

    def get(pattern: str) -> Path:
        if pattern not in written:
            model_type, layout, fields = FOLDERS[pattern]
            folder = written[pattern] = tmp_path_factory.mktemp("folder")
            if layout in LAYOUTS:
                write_tokenizer(folder, layout)
            else:
                make_tokenizer().save_pretrained(folder)
            torch.manual_seed(0)
            config = AutoConfig.for_model(model_type, **{**SIZES, **fields})
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        return written[pattern]

    return get


@pytest.mark.parametrize("name", few_fast(NAMES, NAMES[::4]))
def test_its_model_builds(name, folder_of):
    folder = folder_of(family_of(name))
    cfg = load_config(name, [f"pretrained_model_name_or_path={folder}"])
    model = BUILDER.build(cfg.model)
    llm = model
    if not name.endswith("_hf"):  # whose adapter the Trainer of transformers adds
        assert model.has_adapter is ("lora" in describe(name)["method"])
        llm = model.causal_lm
    assert any(weight.requires_grad for weight in model.parameters())
    hidden = llm.base_model(input_ids=torch.arange(5, 21)[None], use_cache=False)
    assert hidden.last_hidden_state.isfinite().all()
    assert BUILDER.build(cfg.tokenizer)("text")["input_ids"]
