"""xtuner doctor: one line for each item; status 1 only where something needed is missing."""

from __future__ import annotations

import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from xtuner.entry_point import main
from xtuner.reporting import environment_report as report
from xtuner.reporting.environment_report import MISSING, WARNING, Item
from xtuner.utils import hub

QLORA = Path(__file__).parents[1] / "errors" / "base" / "qlora.py"


def lines(capsys) -> dict[str, str]:
    """The status and what was found, by the item's name."""
    out = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    return {line[9:33].strip(): f"{line[:9].strip()} {line[33:]}" for line in out}


def test_this_machine(capsys):
    assert main(["doctor"]) == 0
    found = lines(capsys)
    assert {"python", "torch", "transformers", "bfloat16", "memory", "work dir", "hub"} <= set(
        found
    )
    assert found["python"].startswith("ok 3.")


def test_a_config_that_needs_nothing_more(capsys):
    assert main(["doctor", "quickstart"]) == 0
    assert lines(capsys)["config"] == "ok quickstart: nothing is missing"


def test_a_missing_package_of_a_config(without, capsys):
    without("bitsandbytes")
    assert main(["doctor", str(QLORA)]) == 1
    out = capsys.readouterr().out
    assert "BitsAndBytesConfig needs the package 'bitsandbytes'" in out
    assert "pip install bitsandbytes" in out
    assert "nothing is missing" not in out


def test_deepspeed_of_a_config(without, capsys, tmp_path):
    without("deepspeed")
    config = tmp_path / "config.py"
    strategy = "strategy = dict(type='DeepSpeedStrategy', config='deepspeed_zero2')\n"
    config.write_text(QLORA.read_text() + strategy)
    assert main(["doctor", str(config)]) == 1
    assert "DeepSpeedStrategy needs the package 'deepspeed'" in lines(capsys)["XT0340"]


def test_a_model_that_is_neither_here_nor_to_be_had(capsys):
    name = "internlm2_chat_7b_qlora_alpaca_e3"
    assert main(["doctor", name]) == 1
    found = lines(capsys)["model"]
    assert found.startswith("missing ")
    assert "internlm/internlm2-chat-7b" in found


def test_flash_attention_is_not_needed(monkeypatch, capsys, tmp_path):
    (tmp_path / "model").mkdir()
    monkeypatch.setattr("xtuner.config.adapt.machine.has_gpu", lambda: False)
    options = [f"model.llm.pretrained_model_name_or_path={tmp_path / 'model'}"]
    options.append("model.llm.attn_implementation=flash_attention_2")
    main(["doctor", str(QLORA), "--cfg-options", *options])
    out = capsys.readouterr().out
    assert "flash_attention_2 is not available here" in out


def test_a_config_that_is_not_there(capsys):
    assert main(["doctor", "no_such.py"]) == 1
    assert lines(capsys)["XT0002"].startswith("missing ")


def test_a_missing_package_of_xtuner_ends_the_report(monkeypatch, capsys):
    missing = Item(MISSING, "transformers", "not installed", "pip install 'transformers'")
    monkeypatch.setattr(report, "package_items", lambda: iter([missing]))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "1 item(s) that are needed are missing" in out
    assert "bfloat16" not in out


def test_a_warning_is_no_failure(monkeypatch, capsys):
    monkeypatch.setattr(report, "python_item", lambda: Item(WARNING, "python", "3.8", "another"))
    assert main(["doctor"]) == 0
    assert lines(capsys)["python"] == "warning 3.8"


def test_chinese(monkeypatch, capsys):
    monkeypatch.setenv("XTUNER_LANG", "zh")
    assert main(["doctor", "quickstart"]) == 0
    out = capsys.readouterr().out
    assert "正常     python" in out
    assert "没有缺少的内容" in out


@pytest.fixture
def endpoint(monkeypatch):
    def set_to(url: str) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", url)

    return set_to


@pytest.fixture
def listening():
    """A port that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def answering():
    """The address of a server that answers HEAD with status 501, as a mirror may."""
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_hub_that_answers(endpoint, answering):
    endpoint(answering)
    assert hub.ask_hub()() is None


def test_a_hub_that_refuses(endpoint):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    endpoint(f"http://127.0.0.1:{port}")
    assert "refused" in (hub.ask_hub()() or "")


def test_a_hub_that_does_not_answer(endpoint, listening, monkeypatch):
    monkeypatch.setattr(hub, "LONGEST_ANSWER", 0.3)
    endpoint(f"http://127.0.0.1:{listening}")
    assert hub.ask_hub()()  # and does not wait for ever


def test_an_endpoint_that_is_no_address(endpoint):
    endpoint("no-scheme")
    assert "no-scheme" in (hub.ask_hub()() or "")


def test_offline_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.threading, "Thread", None)
    assert hub.ask_hub()() is None


def test_the_answer_of_the_hub_is_a_line(endpoint, capsys, monkeypatch):
    endpoint("https://mirror.example")
    monkeypatch.setattr(hub, "ask_hub", lambda: lambda: "no route")
    assert main(["doctor"]) == 0
    assert lines(capsys)["hub"] == "warning https://mirror.example cannot be reached: no route"
