"""Fixtures that many tests share: a tiny model folder, one per test session."""

import gc
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A loaded machine draws slowly; that says nothing about the code.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["XTUNER_LANG"] = "en"
if "PYTEST_XDIST_WORKER" in os.environ:  # a thread for each worker: more would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
else:  # before the workers start
    importlib.import_module("xtuner.engine.torchrun").fill_caches()


def pytest_collection_finish() -> None:
    """Garbage collections pass over modules and tests: two million objects, a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prepared data of tests stays out of the user's cache."""
    os.environ["XTUNER_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _future_warnings_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that run in this process keep pyproject's filters: announcements fail the tests."""
    monkeypatch.setattr("xtuner.utils.log_filters.ignore_future_warnings", lambda: None)


@pytest.fixture(autouse=True)
def _environment_stays() -> Iterator[None]:
    """Variables that a test adds, such as a launcher's, do not reach the commands of the next."""
    before = set(os.environ)
    yield
    for name in set(os.environ) - before:
        del os.environ[name]


@pytest.fixture(autouse=True)
def _processes_end() -> Iterator[None]:
    """What a test has forked ends with it, whether it passes or not."""
    yield
    forked = sys.modules.get("tests.helpers.forked")
    if forked is not None:
        forked.end_all()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a two-layer Llama and a byte-level tokenizer."""
    from tests.helpers.tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("models") / "tiny_llama")


@pytest.fixture(scope="session")
def answering_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model that gives one answer to every question."""
    from tests.helpers.answering import save_answering_model

    return save_answering_model(tmp_path_factory.mktemp("models") / "answering")


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level tokenizer with 512 entries, which tests leave as it is."""
    from tests.helpers.tiny import make_tokenizer

    return make_tokenizer()


@pytest.fixture(autouse=True)
def _tokenizer_stays(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that changes the shared tokenizer fails itself, not one of those after it."""
    if "tokenizer" not in request.fixturenames:
        yield
        return
    shared = request.getfixturevalue("tokenizer")
    before = getattr(shared, "chat_template", None)
    yield
    after = getattr(shared, "chat_template", None)
    shared.chat_template = before
    assert after == before


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes check-cfg believe that packages are not installed: ``without("bitsandbytes")``."""
    from xtuner.config.check import packages

    def forget(*names: str) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(packages, "is_missing", lambda name: name in names or not find(name))

    return forget
