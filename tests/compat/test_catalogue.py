"""Every name of the catalogue passes check-cfg without an error."""

import importlib
import importlib.util

import pytest

from tests.helpers import not_built
from xtuner import configs
from xtuner.engine.check import ERROR, check


def test_every_name_passes():
    errors = [
        f"{problem.code} {problem.message}"
        for name in configs.names()
        for problem in check(name)
        if problem.severity == ERROR and not not_built.is_known(problem.message)
    ]
    assert not errors, "\n".join(sorted(set(errors)))


@pytest.mark.parametrize("module", not_built.MODULES)
def test_a_module_that_exists_leaves_the_list(module):
    assert importlib.util.find_spec(module) is None


@pytest.mark.parametrize(("module", "name"), not_built.NAMES)
def test_a_name_that_exists_leaves_the_list(module, name):
    assert not hasattr(importlib.import_module(module), name)
