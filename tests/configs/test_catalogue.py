"""The catalogue's front: its names, descriptions and files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from xtuner.configs import UnknownConfig, cfgs_name_path, deepspeed_path, describe, names, render
from xtuner.configs.models import FAMILIES, MODELS

GOLDEN = Path(__file__).parents[1] / "golden"


def test_all_published_names_are_listed() -> None:
    published = (GOLDEN / "published_config_names.txt").read_text("utf-8").split()
    assert len(published) == 576
    assert set(published) <= set(names())


def test_names_are_sorted_and_unique() -> None:
    assert names() == sorted(set(names()))


def test_no_two_cards_share_a_name() -> None:
    assert len(MODELS) == sum(len(family.CARDS) for family in FAMILIES)


def test_every_name_is_described() -> None:
    for name in names():
        facts = describe(name)
        assert facts["name"] == name
        assert facts["method"], name
        assert facts["path"], name


def test_describe_says_what_is_trained() -> None:
    assert describe("qwen2_5_7b_instruct_lora_alpaca_zh_e2") == {
        "name": "qwen2_5_7b_instruct_lora_alpaca_zh_e2",
        "model": "qwen2_5_7b_instruct",
        "path": "Qwen/Qwen2.5-7B-Instruct",
        "billions": 7.6,
        "method": "lora",
        "dataset": "alpaca_zh",
    }


def test_describe_reads_files_that_are_written_by_hand() -> None:
    assert describe("internlm_7b_qlora_oasst1_mmlu_e3") == {
        "name": "internlm_7b_qlora_oasst1_mmlu_e3",
        "model": "internlm_7b",
        "path": "internlm/internlm-7b",
        "billions": 7.3,
        "method": "qlora",
        "dataset": "oasst1",
    }


def test_files_are_written_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    name = "internlm2_7b_qlora_oasst1_e3"
    assert len(cfgs_name_path) == len(names())
    assert name in set(cfgs_name_path)
    assert not list(tmp_path.iterdir())
    path = Path(cfgs_name_path[name])
    assert path.name == f"{name}.py"
    assert path.read_text("utf-8") == render(name)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    path.write_text("stale")
    assert Path(cfgs_name_path[name]).read_text("utf-8") == render(name)
    assert cfgs_name_path.get("no_such_config") is None


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"])
def test_deepspeed_settings(name: str) -> None:
    settings = json.loads(deepspeed_path(f"deepspeed_{name}").read_text("utf-8"))
    assert settings["zero_optimization"]["stage"] == int(name[4])
    assert ("offload_optimizer" in settings["zero_optimization"]) == ("offload" in name)
    assert settings["gradient_accumulation_steps"] == "auto"


def test_unknown_deepspeed_settings() -> None:
    with pytest.raises(UnknownConfig, match="deepspeed_zero3_offload"):
        deepspeed_path("deepspeed_zero4")


def test_the_catalogue_needs_nothing_but_the_standard_library() -> None:
    code = (
        "import sys, xtuner.configs; xtuner.configs.names();"
        "heavy = {'torch', 'transformers', 'mmengine', 'numpy', 'datasets', 'peft'};"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
