"""Every published name renders to a config with the published settings."""

from __future__ import annotations

import ast
import fnmatch
import json
from pathlib import Path
from typing import Any

import pytest

from xtuner.configs import render

GOLDEN = Path(__file__).parents[1] / "golden"
LINES = [
    json.loads(line)
    for line in (GOLDEN / "published_config_settings.jsonl").read_text("utf-8").splitlines()
]
COMMON: dict[str, Any] = LINES[0]["defaults"]
PUBLISHED: list[dict[str, Any]] = LINES[1:]

# Where we differ on purpose: name pattern, setting, why.
DEVIATIONS = [
    ("*", "use_varlen_attn", "packed samples are kept apart wherever rows are packed"),
    ("*", "evaluation_inputs", "questions that fit the dataset, in our own words"),
    ("*_msagent_react_*", "SYSTEM", "the list only says that it is a tool-use prompt"),
    ("mistral_7b_qlora_skypile_*", "SYSTEM", "plain text has no system prompt"),
    ("*_finetune_custom_dataset_*", "warmup_ratio", "published as warm_up_ratio = 0.025"),
    ("*_w_*_dataset", "warmup_ratio", "published as warm_up_ratio = 0.025"),
    ("internlm_7b_full_intern_repo_*", "warmup_ratio", "published as warm_up_ratio = 0.025"),
    ("internlm_7b_full_intern_repo_*", "pretrained_model_name_or_path", "a place to fill in"),
    ("internlm_7b_full_intern_repo_*", "dataset_folder", "a place to fill in"),
    ("*_w_untokenized_dataset", "dataset_folder", "a folder of the authors' cluster"),
    ("mistral_7b_w_untokenized_*", "pretrained_model_name_or_path", "likewise"),
    ("*_alpaca_enzh_*k_sp*", "accumulative_counts", "multiplied by sequence_parallel_size later"),
    ("*_alpaca_enzh_1M_sp16", "accumulative_counts", "multiplied by sequence_parallel_size later"),
    ("llama2_7b_full_alpaca_enzh_*_sp*", "pretrained_model_name_or_path", "not in HF format"),
    ("deepseek_v2_*", "data_path", "called alpaca_en_path, as everywhere else"),
    ("minicpm_*_full_alpaca_zh_e3", "alpaca_en_path", "Chinese data is called alpaca_zh_path"),
    ("qwen1_5_moe_*_alpaca_e3", "alpaca_zh_path", "the name says alpaca, not alpaca_enzh"),
    ("llama2_7b_full_pgbooks_*", "prompt_template", "its rows are tokens: nothing would use it"),
    ("llama2_70b_full_wizardlm_e1", "max_epochs", "the name says one epoch"),
    ("internlm2_chat_7b_orpo_*", "pretrained_model_name_or_path", "the name says 7b, not 1.8b"),
    ("llava_llama3_70b_*", "llm_name_or_path", "the name says 70b, not 8b"),
    ("llava_llama3_8b_*_gpu1_finetune", "pretrained_pth", "checkpoints are called iter_N.pth"),
]


def settings(text: str) -> dict[str, Any]:
    """The literal top-level settings of a config; an expression stands as '=its source'."""
    found: dict[str, Any] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                value = ast.literal_eval(node.value)
            except ValueError:
                value = "=" + ast.unparse(node.value)
            found[node.targets[0].id] = value
    return found


def deviates(name: str, key: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) and key == k for pattern, k, _ in DEVIATIONS)


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def differences(published: dict[str, Any]) -> list[str]:
    ours = settings(render(published["name"]))
    wrong = []
    for key, value in {**COMMON, **published}.items():
        if key in ("name", "dir") or deviates(published["name"], key):
            continue
        if key not in ours and key in COMMON and key not in published:
            continue
        if plain(ours.get(key)) != value:
            wrong.append(f"{key}: published {value!r}, ours {ours.get(key)!r}")
    return wrong


@pytest.mark.parametrize("published", PUBLISHED, ids=[line["name"] for line in PUBLISHED])
def test_published_settings(published: dict[str, Any]) -> None:
    assert differences(published) == []
