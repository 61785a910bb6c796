"""``xtuner preprocess folder``: which files it takes, in which order, and what it refuses."""

from __future__ import annotations

import pytest

from xtuner.entry_point import main
from xtuner.tools.data_preprocess.folder import files_in_order
from xtuner.utils.errors import UserError


def test_files_are_sorted_or_in_the_order_that_is_written_down(tmp_path):
    for name in ("b.json", "a.json", "c.csv"):
        (tmp_path / name).touch()
    assert files_in_order(tmp_path, ".json", None) == [f"{tmp_path}/a.json", f"{tmp_path}/b.json"]
    order = tmp_path / "data_order.txt"
    order.write_text("b.json\na.json\n")
    listed = files_in_order(tmp_path, ".json", str(order))
    assert listed == [f"{tmp_path}/b.json", f"{tmp_path}/a.json"]


def test_a_listed_file_that_is_missing_is_named(tmp_path):
    order = tmp_path / "data_order.txt"
    order.write_text("gone.json\n")
    with pytest.raises(UserError, match=r"gone\.json"):
        files_in_order(tmp_path, ".json", str(order))
    with pytest.raises(UserError, match=r"\*\.json"):
        files_in_order(tmp_path, ".json", None)


def test_an_unknown_format_is_refused(tmp_path, capsys):
    words = ["--data-folder", ".", "--save-folder", "out", "--tokenizer-path", "x"]
    assert main(["preprocess", "folder", *words, "--dataset-format", "alpacca"]) == 2
    assert "alpacca" in capsys.readouterr().err
