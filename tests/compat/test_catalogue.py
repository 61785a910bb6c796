"""Every name of the catalogue: no error by check-cfg, settings reach in, a dump comes back."""

from __future__ import annotations

import pytest

from tests.compat.overrides import inconsistent, unreached
from tests.helpers.tiers import few_fast
from xtuner import configs
from xtuner.config.check import ERROR
from xtuner.config.check.checker import check_document
from xtuner.config.dump import same_config, spelled_out
from xtuner.config.load import load, load_source
from xtuner.config.source import ConfigSource

PARTS = 20  # each has the time limit of a test


@pytest.fixture(scope="module", params=few_fast(range(PARTS), [0]))
def faults(request: pytest.FixtureRequest) -> dict[str, list[str]]:
    """What is wrong in a part of the catalogue, by test; each config is loaded once."""
    errors, missed, changed, differing = [], [], [], []
    for name in configs.names()[request.param :: PARTS]:
        document = load(name)
        again = load_source(ConfigSource(spelled_out(document.config), "again.py"))
        if not same_config(again, document.config):
            changed.append(name)
        errors += [
            f"{name}: {problem.code} {problem.message}"
            for problem in check_document(document)
            if problem.severity == ERROR
        ]
        missed += [f"{name}: {key}" for key in unreached(document)]
        differing += [f"{name}: {key}" for key in inconsistent(document)]
    return {"errors": errors, "missed": missed, "changed": changed, "differing": differing}


def test_every_name_passes(faults):
    assert not faults["errors"], "\n".join(faults["errors"])


def test_settings_reach_what_is_computed_from_them(faults):
    assert not faults["differing"], "\n".join(faults["differing"])


def test_overrides_reach_in_every_name(faults):
    assert not faults["missed"], "\n".join(faults["missed"])


def test_every_name_comes_back_from_a_dump(faults):
    assert not faults["changed"]
