"""xtuner check-cfg: exit status, text and JSON."""

import json

from xtuner.entry_point import main

NAME = "internlm2_chat_7b_qlora_alpaca_e3"


def test_good(capsys):
    assert main(["check-cfg", NAME, "quickstart"]) == 0
    assert "2 config(s): 0 error(s), 0 warning(s)" in capsys.readouterr().out


def test_error_and_warning(capsys):
    assert main(["check-cfg", NAME, "--cfg-options", "lr=1e-6"]) == 0
    assert "0 error(s), 1 warning(s)" in capsys.readouterr().out
    assert main(["check-cfg", NAME, "--cfg-options", "accumulative_counts=0"]) == 1
    assert f"{NAME}.py:" in capsys.readouterr().out


def test_json(capsys, tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("a = (\n")
    assert main(["check-cfg", str(path), "--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)
    assert problem["code"] == "XT0001"
    assert (problem["file"], problem["line"]) == (str(path), 1)
    assert set(problem) >= {"severity", "column", "key", "message", "hint"}


def test_missing_file(capsys):
    assert main(["check-cfg", "no_such.py"]) == 1
    assert "there is no such config file" in capsys.readouterr().out
