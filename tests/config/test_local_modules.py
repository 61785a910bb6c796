"""Code of the user's own: modules beside a config, and what a config defines itself."""

from __future__ import annotations

import importlib
import shutil
import sys

import pytest

from xtuner.config import load_config, write_config
from xtuner.config.check.checker import check
from xtuner.config.dump import spelled_out
from xtuner.config.load import load
from xtuner.config.override import override
from xtuner.dataset.map_fns import row_function
from xtuner.utils.errors import UserError

MAP = """
import torch
from helper_of_mine import PREFIX
def my_map_fn(row):
    return {"text": PREFIX + row["q"], "dtype": str(torch.float32)}
class Bell(torch.nn.Module):
    sound = PREFIX
"""
PLAIN = "from my_map import Bell, my_map_fn\n"
USES = "extra = 1\nmodel = dict(type=Bell)\ndata = dict(map_fn=my_map_fn)\n"
OWN = """
import torch
from helper_of_mine import PREFIX
length = 3
longer = length + 1
def my_map_fn(row):
    return {"text": PREFIX + row["q"], "dtype": str(torch.float32), "longer": longer}
class Bell(torch.nn.Module):
    sound = PREFIX
"""
WAYS = {
    "a module beside it": PLAIN,
    "a relative import": PLAIN.replace("my_map", ".my_map", 1),
    "read_base": "from mmengine.config import read_base\nwith read_base():\n"
    "    from .settings import *\n    from .my_map import Bell, my_map_fn\n",
    "the config itself": OWN,
    "a package": "from pack.inner import Bell, my_map_fn\n",
    "a base config": "from mmengine.config import read_base\nwith read_base():\n"
    "    from .base import *\nfrom my_map import Bell\n",
    "a base above": "from mmengine.config import read_base\nwith read_base():\n"
    "    from ..shared.base import *\nfrom my_map import Bell\n",
}


@pytest.fixture
def folder(tmp_path):
    """A folder of a user, with modules of his own."""
    folder = tmp_path / "my configs"
    for inner in ("pack", "../shared"):
        (folder / inner).mkdir(parents=True)
    (folder / "my_map.py").write_text(MAP)
    (folder / "pack" / "inner.py").write_text(MAP)
    (folder / "helper_of_mine.py").write_text("PREFIX = '是 '\n", "utf-8")
    (folder / "settings.py").write_text("lr = 1e-4\n")
    function = MAP[: MAP.index("class")].replace("import torch", "import torch\nlr = 1e-4", 1)
    (folder / "base.py").write_text(function)
    (folder / "../shared/base.py").write_text(
        function.replace("from helper_of_mine import PREFIX", "PREFIX = '是 '"), "utf-8"
    )
    return folder


@pytest.fixture(autouse=True)
def _modules_of_tests_are_forgotten():
    yield
    for name in ("my_map", "helper_of_mine", "pack", "pack.inner"):
        sys.modules.pop(name, None)


def calls(path, *options: str) -> dict[str, object]:
    """What the config's function gives, once its class has been made too."""
    cfg = load_config(path, options)
    assert cfg.model.type.sound == "是 "
    assert isinstance(cfg.model.type(), importlib.import_module("torch").nn.Module)
    return cfg.data.map_fn({"q": "x"})


@pytest.mark.parametrize("way", WAYS)
def test_every_way_works_and_a_copy_works_alone(folder, tmp_path, way):
    path = folder / "cfg.py"
    path.write_text(WAYS[way] + USES, "utf-8")
    assert not [p for p in check(path) if p.code.startswith(("XT00", "XT01"))]
    result = calls(path)
    assert (result["text"], result["dtype"]) == ("是 x", "torch.float32")
    document = override(load(path), ["extra=3"])
    work = tmp_path / "work dir"
    write_config(document, work / "cfg.py")
    shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "shared")
    assert calls(work / "cfg.py") == result
    assert load_config(work / "cfg.py").extra == 3
    if "my_map" in sys.modules:  # the copy was imported, not what is left of the original
        assert str(work) in sys.modules["my_map"].__file__


@pytest.mark.parametrize("module", ["my_map", "pack.inner"])
def test_a_module_that_a_text_names(folder, tmp_path, module):
    path = folder / "cfg.py"
    (folder / "other.py").write_text("raise AssertionError\n")
    path.write_text(f"data = dict(map_fn='{module}.my_map_fn')\nfile = 'other.jsonl'\n")
    work = tmp_path / "work dir"
    write_config(load(path), work / "cfg.py")
    copied = {file.name for file in work.rglob("*.py")}
    assert copied == {"cfg.py", "helper_of_mine.py", f"{module.rpartition('.')[2]}.py"}
    shutil.rmtree(folder)
    function = row_function(load_config(work / "cfg.py").data.map_fn)
    assert function is not None and function({"q": "x"})["text"] == "是 x"


def test_overrides_reach_what_a_function_of_the_config_reads(folder):
    path = folder / "cfg.py"
    path.write_text(OWN + USES, "utf-8")
    assert calls(path)["longer"] == 4
    assert calls(path, "length=7")["longer"] == 8
    text = spelled_out(load_config(path))
    assert "def my_map_fn(row):" in text and "class Bell(torch.nn.Module):" in text
    assert "from helper_of_mine import PREFIX" in text
    path.write_text(text, "utf-8")
    assert calls(path)["longer"] == 4


def test_what_is_called_while_loading_is_called(folder):
    path = folder / "cfg.py"
    path.write_text(
        "from torch.optim import AdamW\n"
        "def half(x):\n    return x / 2\n"
        "class Size:\n    width = 4\n"
        "lr = half(1e-4)\nwidth = Size().width\noptimizer = dict(type=AdamW, lr=lr)\n"
    )
    cfg = load_config(path)
    assert (cfg.optimizer.lr, cfg.width) == (5e-5, 4)
    path.write_text("from torch.optim import AdamW\ndef f():\n    return AdamW(1)\nx = f()\n")
    with pytest.raises(UserError, match="import it inside the function"):
        load_config(path)


def test_a_relative_import_above_the_folder_is_refused(folder):
    path = folder / "cfg.py"
    path.write_text("from ..shared.base import my_map_fn\nx = my_map_fn\n")
    with pytest.raises(UserError, match="above the folder of the config"):
        load_config(path)


def test_an_installed_package_goes_first(folder):
    (folder / "datasets.py").write_text("def load_dataset():\n    raise AssertionError\n")
    path = folder / "cfg.py"
    path.write_text("from datasets import load_dataset\ndata = dict(type=load_dataset)\n")
    assert load_config(path).data.type.__module__.startswith("datasets.")
    write_config(load(path), folder / "work" / "cfg.py")
    assert [file.name for file in (folder / "work").iterdir()] == ["cfg.py"]


def test_a_module_that_is_not_there_is_named(folder):
    path = folder / "cfg.py"
    path.write_text("from my_mop import f\ndata = dict(map_fn=f)\n")
    (found,) = [problem for problem in check(path) if problem.code == "XT0101"]
    assert "beside the config as my_mop.py" in found.hint
