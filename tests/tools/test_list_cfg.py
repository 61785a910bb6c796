"""``xtuner list-cfg``."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from xtuner.configs import names
from xtuner.entry_point import main


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_all_names_between_two_rulers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list-cfg"]) == 0
    head, *listed, foot, count, others = lines(capsys)
    assert head == "==========================CONFIGS==========================="
    assert foot == "=" * 60
    assert listed == names()
    assert count.startswith(f"{len(listed)} configs. 'xtuner list-cfg --models'")
    assert "copy-cfg --model" in others


def test_a_pattern_is_shown_and_narrows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list-cfg", "-p", "InternLM2_1_8B"]) == 0
    out = lines(capsys)
    assert out[1] == "PATTERN: InternLM2_1_8B"
    assert {"internlm2_1_8b_full_alpaca_e3", "internlm2_1_8b_qlora_alpaca_e3"} <= set(out)
    assert all("internlm2_1_8b" in line for line in out[3:-3])


def test_narrowed_by_what_is_trained(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "Qwen2.5-7B", "--method", "dpo", "--dataset", "ultrafeedback", "--json"]
    assert main(["list-cfg", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [facts["name"] for facts in found] == [
        "qwen2_5_7b_instruct_dpo_lora_varlenattn_ultrafeedback_e1"
    ]
    assert found[0]["path"] == "Qwen/Qwen2.5-7B-Instruct"


def test_models_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list-cfg", "--models", "--json", "-p", "qwen2_5"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"full", "lora", "qlora"} <= {*found["qwen2_5_7b_instruct"]["methods"]}
    assert main(["list-cfg", "--models", "--json", "-p", "nobody"]) == 1
    assert json.loads(capsys.readouterr().out) == {}


def test_long_shows_size_and_path(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list-cfg", "-p", "internlm2_1_8b_full_alpaca_e3", "--long"]) == 0
    assert lines(capsys)[-4].split() == [
        "internlm2_1_8b_full_alpaca_e3",
        "1.9B",
        "full",
        "alpaca",
        "internlm/internlm2-1_8b",
    ]


def test_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list-cfg", "-p", "internlm2_7b_qlora_alpacca_e3"]) == 1
    out = lines(capsys)
    assert "No config fits." in out
    assert "  internlm2_7b_qlora_alpaca_e3" in out


def test_unknown_datasets_and_methods_are_answered(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list-cfg", "--dataset", "alpacca", "--method", "sft"]) == 1
    out = capsys.readouterr().out
    assert "Datasets are called alpaca, " in out
    assert "Methods are called full, lora, " in out


def test_a_name_that_works_unlisted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list-cfg", "-p", "qwen2_5_7b_instruct_lora_alpaca_zh_e2"]) == 1
    assert "is not listed, but it is a config" in capsys.readouterr().out


def test_chinese(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XTUNER_LANG", "zh")
    assert main(["list-cfg", "-p", "nothing_like_this"]) == 1
    assert "没有符合条件的配置。" in lines(capsys)


def test_a_reader_that_leaves_early_sees_no_traceback() -> None:
    command = f"{sys.executable} -m xtuner list-cfg | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "CONFIGS" in done.stdout
    assert done.stderr == ""
