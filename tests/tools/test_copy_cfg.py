"""``xtuner copy-cfg``."""

from __future__ import annotations

from pathlib import Path

import pytest

from xtuner.configs import render
from xtuner.entry_point import main

NAME = "internlm2_chat_1_8b_qlora_oasst1_e3"


def test_writes_the_config_and_says_what_to_do_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["copy-cfg", NAME, str(tmp_path / "new")]) == 0
    path = tmp_path / "new" / f"{NAME}_copy.py"
    assert path.read_text("utf-8") == render(NAME)
    out = capsys.readouterr().out
    assert f"Copy to {path}" in out
    assert f"xtuner train {path}" in out


def test_a_file_is_replaced_only_when_told_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"{NAME}_copy.py"
    path.write_text("lr = 1")
    assert main(["copy-cfg", NAME, str(tmp_path)]) == 1
    assert path.read_text() == "lr = 1"
    assert "is there already" in capsys.readouterr().err
    assert main(["copy-cfg", NAME, str(tmp_path), "--force"]) == 0
    assert path.read_text("utf-8") == render(NAME)


def test_an_unlisted_name(tmp_path: Path) -> None:
    name = "qwen2_5_7b_instruct_lora_alpaca_zh_e2"
    assert main(["copy-cfg", name, str(tmp_path)]) == 0
    assert (tmp_path / f"{name}_copy.py").is_file()


def test_an_unknown_name_is_answered_with_the_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["copy-cfg", "llama2_7b_chat_qlora", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "there is no config 'llama2_7b_chat_qlora'" in error
    assert "  llama2_7b_chat_qlora_alpaca_e3\n" in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["copy-cfg", NAME, str(tmp_path / "file")]) == 1
    assert "cannot write" in capsys.readouterr().err


def test_a_python_file_may_be_named(tmp_path):
    file = tmp_path / "deep" / "my_config.py"
    assert main(["copy-cfg", "quickstart", str(file)]) == 0
    assert file.is_file()
    assert not (file / "quickstart_copy.py").exists()
    assert main(["copy-cfg", "quickstart", str(file)]) == 1
