"""Names are found in source files, without importing these."""

from __future__ import annotations

import sys

import pytest

from xtuner.config.names import NotThere, find, module_exists, module_file

FILES = {
    "__init__.py": """
from .inner import Reexported as Renamed
from .stars import *
from . import inner
_LAZY = {"lazy": ["Lazy"]}
if True:
    class Conditional: pass
try:
    from .absent_compiled import thing
except ImportError:
    thing = None
Alias = Conditional
raise RuntimeError("imported")
""",
    "inner.py": "class Reexported:\n    def __init__(self, a): pass\n",
    "stars.py": "def starred(x, *, y=1): pass\nMADE = made()\n",
    "lazy.py": "class Lazy: pass\n",
    "globals.py": "for name in ('x',):\n    globals()[name] = 1\n",
    "attributes.py": "def __getattr__(name): return name\n",
}


@pytest.fixture
def package(tmp_path, monkeypatch, request) -> str:
    name = f"names_{abs(hash(request.node.name)) % 10**9}"  # results are cached by name
    folder = tmp_path / name
    folder.mkdir()
    for file, text in FILES.items():
        (folder / file).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


@pytest.mark.parametrize(
    ("name", "module", "definition"),
    [
        ("Renamed", ".inner", "Reexported"),
        ("starred", ".stars", "starred"),
        ("Conditional", "", "Conditional"),
        ("Alias", "", "Conditional"),
        ("Lazy", ".lazy", "Lazy"),
    ],
)
def test_definitions(package, name, module, definition):
    found = find(package, name)
    assert (found.module, found.node.name) == (package + module, definition)
    assert package not in sys.modules


def test_modules_inside(package):
    assert find(package, "inner") is None  # it exists, and has no definition
    assert module_file(f"{package}.inner").name == "inner.py"
    assert module_exists(f"{package}.stars") and not module_exists(f"{package}.nothing")


@pytest.mark.parametrize(("module", "name"), [("", "Absent"), (".inner", "Renamed")])
def test_what_is_not_there(package, module, name):
    with pytest.raises(NotThere) as error:
        find(package + module, name)
    assert (error.value.module, error.value.name) == (package + module, name)


def test_a_package_that_is_not_installed():
    with pytest.raises(NotThere) as error:
        find("no_such_package_anywhere.inner", "Name")
    assert error.value.package == "no_such_package_anywhere"


@pytest.mark.parametrize("module", ["globals", "attributes"])
def test_names_made_at_run_time_may_exist(package, module):
    assert find(f"{package}.{module}", "anything") is None


def test_compiled_modules_may_have_any_name():
    assert find("math", "no_such_function") is None
    assert module_file("math") is None
