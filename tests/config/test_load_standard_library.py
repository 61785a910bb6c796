"""The standard library works at the top level of a config; wrong files get the right suggestion."""

from __future__ import annotations

import copy
from importlib.machinery import ModuleSpec

import mmengine.config.utils
import pytest

from xtuner.config.dump import dump
from xtuner.config.load import load
from xtuner.config.values import copyable, own_values
from xtuner.utils.errors import UserError

CALLS = """
import json
import os
import os.path as osp
from datetime import datetime
from pathlib import Path

from torch.optim import AdamW

model_dir = os.environ.get("MODEL_DIR", "x")
stamp = datetime.now().strftime("%Y")
folder = str(Path("/a") / "b")
file = osp.join("a", "b")
settings = json.loads('{"lr": 1}')
optimizer = dict(type=AdamW, lr=settings["lr"])
"""


def test_the_standard_library_runs_and_other_imports_stay_lazy(tmp_path, monkeypatch):
    monkeypatch.setenv("MODEL_DIR", "/models")
    config = tmp_path / "c.py"
    config.write_text(CALLS)
    document = load(config)
    values = own_values(document.config)
    assert {name: values[name] for name in ("model_dir", "folder", "file")} == {
        "model_dir": "/models",
        "folder": "/a/b",
        "file": "a/b",
    }
    assert values["optimizer"]["lr"] == 1
    assert not {"Path", "datetime", "os", "json", "osp"} & set(values)
    again = tmp_path / "again.py"
    again.write_text(dump(document))
    assert own_values(load(again).config)["file"] == "a/b"


def test_what_cannot_be_copied_is_left_out_where_the_config_is_copied(tmp_path):
    config = tmp_path / "c.py"
    config.write_text(f"{CALLS}\nlog = open(os.devnull)\nlock = dict(type=AdamW)\n")
    loaded = load(config).config
    with pytest.raises(TypeError, match="cannot pickle"):
        copy.deepcopy(loaded)
    copied = copy.deepcopy(copyable(loaded))
    kept = own_values(loaded).keys() - {"log"}
    assert own_values(copied).keys() == kept and {"file", "optimizer", "lock"} <= kept


def test_several_modules_in_one_import(tmp_path):
    config = tmp_path / "c.py"
    config.write_text(
        "word = '你'; import os.path as osp, json\nif True:\n    import math, re\n"
        "x = osp.join('a', 'b') + json.dumps(math.floor(2.5)) + re.escape('c')\n"
    )
    values = own_values(load(config).config)
    assert values["x"] == "a/b2c" and values["word"] == "你"


def test_yaml_of_a_base_file_runs_nothing(tmp_path):
    (tmp_path / "base.yaml").write_text(f"x: !!python/object/apply:os.mkdir [{tmp_path}/made]\n")
    config = tmp_path / "c.py"
    config.write_text("_base_ = ['base.yaml']\n")
    with pytest.raises(UserError, match="python/object"):
        load(config)
    assert not (tmp_path / "made").exists()


IMPORT = "from mmengine.config import read_base\n"
LAYOUTS = {
    "conda": ("/opt/conda/envs/x", "/opt/conda/envs/x/lib/python3.11"),
    "venv of conda": ("/home/me/venv", "/opt/conda/lib/python3.11"),
    "uv": ("/home/me/p/.venv", "/home/me/.local/share/uv/python/cpython-3.11/lib/python3.11"),
    "pyenv": ("/home/me/.pyenv/versions/x", "/home/me/.pyenv/versions/3.11.7/lib/python3.11"),
    "symbolic link": ("/srv/venv", "/data/venvs/real/lib/python3.11"),
    "Debian": ("/usr", "/usr/lib/python3/dist-packages/../../python3.11"),
    "frozen": ("/opt/app", None),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wherever_python_lies_its_library_runs(layout, tmp_path, monkeypatch):
    """mmengine looks at the folders of modules: with some layouts it takes ``os`` for lazy."""
    root, library = LAYOUTS[layout]

    def find_spec(name, package=None):
        return ModuleSpec(name, None, origin=library and f"{library}/{name}.py")

    monkeypatch.setattr(mmengine.config.utils, "PYTHON_ROOT_DIR", root)
    monkeypatch.setattr(mmengine.config.utils, "find_spec", find_spec)
    assert mmengine.config.utils._is_builtin_module("os") == (layout in ("conda", "Debian"))
    config = tmp_path / "c.py"
    config.write_text(CALLS)
    values = own_values(load(config).config)
    assert values["folder"] == "/a/b" and values["file"] == "a/b"
    assert values["stamp"].isdigit()


@pytest.mark.parametrize(
    ("text", "line", "hint"),
    [
        ("from torch.optim import AdamW\nx = AdamW(3)\n", 2, "is not loaded while"),
        ("a = 1\nb = 2，\n", 2, "， is a full-width character; write ,"),
        ("a = dict（b=1）\n", 1, "（ is a full-width character; write ("),
        ("a = “b”\n", 1, '“ is a full-width character; write "'),
        ('a = "C:\\Users\\me"\n', 1, "backslashes of a Windows path"),
        ('a = "b\n', 1, "a quotation mark is missing"),
        ("a = 'C:\\\\data\\\\'\nb = 'D:\\\\x\\'\n", 2, "backslashes of a Windows path"),
        ("a = １２\n", 1, "１ is a full-width character; write 1"),
        ("<<<<<<< HEAD\na = 1\n", 1, "a conflict of git"),
        ("raise RuntimeError\n", 1, None),
        ("a = dict(b=1\nc = 2\n", 1, "missing comma or bracket"),
        ("import os\na = os.environ['NOT_SET']\n", 2, "export NOT_SET="),
        (f"{IMPORT}with read_base():\n    from .c import *\n", 3, "a base of; delete"),
        ("_base_ = './c.py'\n", 1, "a base of; delete"),
        (f"{IMPORT}with read_base():\n    from .nowhere import *\n", 3, "relative to the config"),
        ("_base_ = './nowhere.py'\n", 1, "relative to the config"),
        ("a = 1 / 0\n", 1, None),
    ],
)
def test_what_does_not_load_is_named_with_its_line(text, line, hint, tmp_path):
    config = tmp_path / "c.py"
    config.write_text(text)
    with pytest.raises(UserError) as caught:
        load(config)
    assert caught.value.where.line == line
    assert (hint is None and caught.value.hint is None) or hint in caught.value.hint
    assert not caught.value.message.rstrip().endswith(":")


def test_the_file_beside_is_suggested(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstar.py").write_text("a = 1\n")
    with pytest.raises(UserError) as caught:
        load("quickstar")
    assert caught.value.hint == "did you mean quickstar.py?"
    with pytest.raises(UserError) as caught:
        load("quickstar.pyy")
    assert caught.value.hint.startswith("did you mean quickstar.py")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "c.py").write_text("a = 1\n")
    with pytest.raises(UserError, match="a folder, not a config") as caught:
        load("folder/")
    assert "folder/c.py" in caught.value.hint
