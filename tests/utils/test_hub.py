"""Whether a model can be had: known within seconds, whatever the network does."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator

import huggingface_hub.constants
import pytest

from xtuner.export.weights import Weights
from xtuner.utils import hub
from xtuner.utils.errors import UserError, Where

NAME = "somebody/some-model"
WHERE = Where("c.py", key="model.llm.pretrained_model_name_or_path")


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does for a model that exists, is private, or lacks the file."""

    def do_HEAD(self) -> None:
        code, error = {
            "there": (200, None),
            "private": (401, "RepoNotFound"),
            "gated": (403, "GatedRepo"),
            "adapter": (404, "EntryNotFound"),
            "broken": (500, None),
        }[self.path.split("/")[2]]
        self.send_response(code)
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("ETag", '"0"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", "2")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(autouse=True)
def online(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def endpoint(monkeypatch) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield monkeypatch
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ["there", "adapter", "broken"])
def test_a_hub_that_answers_is_enough(endpoint, name):
    """What is wrong beyond that, loading the model says."""
    hub.require_available(f"somebody/{name}", WHERE)


@pytest.mark.parametrize("name", ["private", "gated"])
def test_a_model_that_may_not_be_read(endpoint, name):
    with pytest.raises(UserError, match="that you may read") as error:
        hub.require_available(f"somebody/{name}", WHERE)
    assert error.value.where is WHERE and "hf auth login" in str(error.value)


def test_nobody_answers(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be reached"):
        hub.require_available(NAME, WHERE)


def test_a_silent_server_is_given_up(monkeypatch):
    monkeypatch.setattr(hub, "LONGEST_ANSWER", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, and never says a word
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(UserError, match="cannot be reached"):
            hub.require_available(NAME, WHERE)


def test_offline_nothing_is_asked(monkeypatch, endpoint):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot be reached"):
        hub.require_available("somebody/there", WHERE)


def test_folders(tmp_path):
    hub.require_available(str(tmp_path), WHERE)
    for name in ("./no/such", str(tmp_path / "no"), "~/no", "a/b/c"):
        with pytest.raises(UserError, match="does not exist"):
            hub.require_available(name, WHERE)


def test_what_is_no_name_of_the_hub(endpoint):
    with pytest.raises(UserError, match="has no model"):
        hub.require_available("a name with spaces", WHERE)


@pytest.mark.parametrize(
    "content",
    [
        '{"weight_map": {"a": "../other.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": 5}}',
        '{"weight_map": ["a.safetensors"]}',
        '{"weight_map": {',
        "[]",
        "[" * 100_000,
    ],
)
def test_an_index_of_weights_that_cannot_be_used_is_refused(tmp_path, content):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)
    for read in (lambda: hub.require_available(str(tmp_path)), lambda: Weights(tmp_path)):
        with pytest.raises(UserError, match=r"index\.json: this index of weights cannot be used"):
            read()
