"""The examples run: the notebook's cells, the demo data's commands; each folder has a README."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.e2e.test_own_code import say

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDERS = sorted(path for path in EXAMPLES.iterdir() if path.is_dir())


def cells(notebook: Path) -> list[str]:
    """The code cells of a notebook."""
    content = json.loads(notebook.read_text("utf-8"))
    assert content["nbformat"] == 4
    assert all(not cell.get("outputs") for cell in content["cells"]), "clear the outputs"
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]


def test_the_notebook(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for source in cells(EXAMPLES / "quickstart.ipynb"):
        shorter = source.replace("max_epochs=24", "max_epochs=1")
        names["_status"] = None
        exec(compile(re.sub(r"^main\(", "_status = main(", shorter), "cell", "exec"), names)
        assert not names["_status"], capsys.readouterr().err
    said = capsys.readouterr().out
    assert "51 rows read" in said and "trained in" in said
    assert "Please introduce yourself -> " in said
    assert (tmp_path / "curves.png").is_file() and (tmp_path / "hf" / "config.json").is_file()


def test_the_notebook_trains_as_long_as_the_config():
    text = (EXAMPLES.parent / "xtuner/configs/oneoffs/quickstart.py").read_text("utf-8")
    epochs = re.search(r"^max_epochs = (\d+)", text, re.M)
    assert epochs and f"max_epochs={epochs[1]}" in "".join(cells(EXAMPLES / "quickstart.ipynb"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_each_folder_has_a_readme_that_names_what_is_in_it(folder):
    text = (folder / "README.md").read_text("utf-8")
    for item in folder.iterdir():
        if item.name not in ("README.md", "__pycache__"):
            assert f"`{item.name}`" in text, item
    assert f"{folder.name}/README.md" in (EXAMPLES / "README.md").read_text("utf-8")


@pytest.mark.slow
def test_the_commands_of_the_demo_data(tmp_path, tiny_llama, monkeypatch, capsys):
    text = (EXAMPLES / "demo_data" / "README.md").read_text("utf-8")
    block = re.search(r"```\n(.*?)```", text, re.S)
    assert block
    shutil.copytree(EXAMPLES / "demo_data", tmp_path / "demo_data")
    monkeypatch.chdir(tmp_path / "demo_data")
    for line in block[1].splitlines():
        words = shlex.split(line)
        if words[0] == "cd":
            monkeypatch.chdir(words[1])
            continue
        options = [f"model.pretrained={tiny_llama}"]
        options += ["max_epochs=1", "max_length=512"] if words[1] == "train" else []
        said = say(capsys, *words[1:], "--cfg-options", *options)
    assert "trained in" in said
