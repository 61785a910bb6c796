"""The grammar of names: what resolves, what does not, and what is said then."""

from __future__ import annotations

import pytest

from xtuner.configs import UnknownConfig, names, render
from xtuner.configs.datasets import DATASETS
from xtuner.configs.models import MODELS
from xtuner.configs.names import parse
from xtuner.configs.settings import METHODS
from xtuner.configs.unknown import nearest


def refused(name: str) -> UnknownConfig:
    with pytest.raises(UnknownConfig) as caught:
        render(name)
    return caught.value


def test_a_sentence_is_read() -> None:
    sentence = parse("qwen2_5_7b_instruct_lora_alpaca_zh_e2")
    assert sentence.model.path == "Qwen/Qwen2.5-7B-Instruct"
    assert sentence.method.weights == "lora"
    assert sentence.dataset.name == "alpaca_zh"
    assert sentence.options == {"max_epochs": 2}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("llama3_1_8b_full_alpaca_e1_8k", {"max_epochs": 1, "max_length": 8192}),
        ("llama3_1_8b_full_alpaca_e1_1M", {"max_epochs": 1, "max_length": 1024 * 1024}),
        ("llama3_1_8b_full_alpaca_e1_gpu8", {"max_epochs": 1, "accumulative_counts": 2}),
        ("llama3_1_8b_full_alpaca_e1_32gpus", {"max_epochs": 1, "accumulative_counts": 1}),
        ("llama3_1_8b_full_alpaca_e1_sp4", {"max_epochs": 1, "sequence_parallel_size": 4}),
    ],
)
def test_options(name: str, said: dict[str, int]) -> None:
    assert parse(name).options == said


def test_the_longest_name_of_a_model_wins() -> None:
    assert parse("qwen_1_8b_chat_qlora_alpaca_e3").model.name == "qwen_1_8b_chat"
    assert parse("qwen_1_8b_qlora_alpaca_e3").model.name == "qwen_1_8b"
    assert parse("llama2_7b_qlora_oasst1_512_e3").dataset.name == "oasst1_512"
    assert parse("internlm2_chat_1_8b_dpo_full_varlenattn").method_name == "dpo_full_varlenattn"


def test_preferences_have_a_usual_dataset() -> None:
    assert parse("internlm2_chat_1_8b_dpo_full").dataset.name == "orpo_dpo_mix_40k"
    assert parse("qwen2_5_7b_instruct_orpo_lora_e2").options == {"max_epochs": 2}


@pytest.mark.parametrize(
    "name",
    [
        "internlm2_chat_1_8b_qlora_oasst1_e3",
        "internlm2_1_8b_full_alpaca_e3",
        "internlm2_5_chat_7b_qlora_alpaca_e3",
        "internlm2_7b_qlora_oasst1_e3",
        "qwen2_5_7b_instruct_lora_alpaca_zh_e2",
        "llava_qwen2_5_7b_instruct_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune",
    ],
)
def test_names_of_guides_resolve(name: str) -> None:
    compile(render(name), name, "exec")


@pytest.mark.parametrize(
    ("name", "reason", "suggestion"),
    [
        ("llama2_7b_chat_qlora", "comes a dataset", "llama2_7b_chat_qlora_alpaca_e3"),
        ("lama2_7b_qlora_alpaca_e3", "no model", "llama2_7b_qlora_alpaca_e3"),
        ("qwen3_8b_sft_alpaca_e3", "comes a method", "qwen3_8b_full_alpaca_e3"),
        ("qwen3_8b_qlora_alpaca", "how many epochs", "qwen3_8b_qlora_alpaca_e3"),
        ("qwen3_8b_qlora_alpaca_e3_xx", "'xx' is not an option", "qwen3_8b_qlora_alpaca_e3"),
        ("qwen3_8b_dpo_lora_alpaca_e1", "holds sft rows", "qwen3_8b_dpo_lora_ultrafeedback_e1"),
        ("qwen3_8b_base_dpo_lora", "is a base model", "qwen3_8b_dpo_lora"),
        ("internvl_v9_qlora_finetune", "InternVL config is called", None),
        ("llava_x", "a LLaVA config is called", None),
        ("phi4_reward_lora", "no spare token", None),
        ("qwen3_8b_lora_oasst1_512_e3_varlen", "not packed", "qwen3_8b_lora_oasst1_512_e3"),
        ("qwen3_8b_lora_ultrafeedback_e1", "holds preference rows", "qwen3_8b_lora_alpaca_e1"),
        ("deepseek_v3_full_alpaca_e3", "use qlora", "deepseek_v3_qlora_alpaca_e3"),
        ("deepseek_v3_base_qlora_alpaca_e3", "convert them to bfloat16", None),
        ("", "does not begin", None),
    ],
)
def test_nonsense_is_refused_with_a_reason(name: str, reason: str, suggestion: str | None) -> None:
    error = refused(name)
    assert reason in error.reason
    if suggestion:
        assert suggestion in error.suggestions
        assert render(error.suggestions[0])


def test_every_sensible_combination_resolves() -> None:
    """All datasets and methods on a base and on a chat model: a config, or a reason."""
    for model in ("qwen2_5_7b", "qwen2_5_7b_instruct", "qwen3_vl_8b_instruct"):
        for method_name, method in METHODS.items():
            if method.kind == "reward" and "reward_token_id" not in MODELS[model].settings:
                continue
            for dataset in DATASETS.values():
                name = f"{model}_{method_name}_{dataset.name}_e1"
                fits = (dataset.kind == "preference") == (method.kind != "sft")
                if dataset.kind == "vision":
                    sees = MODELS[model].kind == "vision"
                    fits = fits and sees and method.weights != "int8_lora"
                if fits and (method.kind == "sft" or MODELS[model].chat):
                    compile(render(name), name, "exec")
                else:
                    refused(name)


def test_nearest_prefers_what_the_name_begins() -> None:
    assert nearest("internlm2_7b_qlora", names())[0] == "internlm2_7b_qlora_alpaca_e3"
