"""``xtuner preprocess folder``: what it refuses."""

from __future__ import annotations

from xtuner.entry_point import main


def test_an_unknown_format_is_refused(tmp_path, capsys):
    words = ["--data-folder", ".", "--save-folder", "out", "--tokenizer-path", "x"]
    assert main(["preprocess", "folder", *words, "--dataset-format", "alpacca"]) == 2
    assert "alpacca" in capsys.readouterr().err
