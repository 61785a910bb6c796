"""The commands of the guides, line by line, on a folder in InternLM2.5's layout on the hub.

The folder's code raises when it runs, and no line says ``trust_remote_code``.
"""

from __future__ import annotations

import io
import json
import re
import shlex
from pathlib import Path

import pytest

from tests.helpers.forked import run
from tests.helpers.hub_models import save_hub_model
from xtuner.entry_point import main

pytestmark = pytest.mark.slow
QUESTION, ANSWER = "请介绍一下你自己", "我是小调，一个用来测试的小助手。"
CONFIG = "internlm2_5_chat_7b_qlora_alpaca_e3_copy.py"
EDITS = {
    'pretrained_model_name_or_path = "internlm/internlm2_5-7b-chat"': (
        'pretrained_model_name_or_path = "./internlm2_5-7b-chat"'
    ),
    'alpaca_en_path = "tatsu-lab/alpaca"': 'alpaca_en_path = "./assistant.json"',
    "dataset=dict(type=load_dataset, path=alpaca_en_path)": (
        "dataset=dict(type=load_dataset, path='json', data_files=dict(train=alpaca_en_path))"
    ),
    "dataset_map_fn=alpaca_map_fn": "dataset_map_fn=None",
    '"请给我介绍五个上海的景点"': f'"{QUESTION}"',
    "SYSTEM = SYSTEM_TEMPLATE.alpaca": 'SYSTEM = ""',
    "max_length = 2048": "max_length = 128",
    "save_steps = 500": "save_steps = 30",
    "evaluation_freq = 500": "evaluation_freq = 1000",
    # what a tiny model with random weights needs to learn a sentence
    "lr = 2e-4": "lr = 1e-2",
    "max_epochs = 3": "max_epochs = 10",
    "lora_alpha=16": "lora_alpha=64",
    "lora_dropout=0.1": "lora_dropout=0",
}


class Terminal:
    """A folder in which lines are typed; those with DeepSpeed run as a process."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys

    def type(self, line: str, stdin: str = "") -> str:
        """Run a line; what it printed."""
        _, *words = shlex.split(line)
        if "--deepspeed" in words:
            return self._in_a_process(words)
        self.capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.stdin", io.StringIO(stdin))
            status = main(words)
        printed = "".join(self.capsys.readouterr())
        assert status == 0, printed
        return printed

    def _in_a_process(self, words: list[str]) -> str:
        done = run("-m", "xtuner", *words)
        return done.stdout + done.stderr

    def newest(self, pattern: str) -> str:
        """``$(ls -t PATTERN | head -n 1)``."""
        return str(max(self.folder.glob(pattern), key=lambda file: file.stat().st_mtime))


@pytest.fixture
def terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_hub_model(tmp_path / "internlm2_5-7b-chat", "internlm2_5", initializer_range=0.2)
    rows = [{"conversation": [{"input": QUESTION, "output": ANSWER}]}] * 24
    (tmp_path / "assistant.json").write_text(json.dumps(rows, ensure_ascii=False), "utf-8")
    return Terminal(tmp_path, capsys)


def test_the_assistant_of_the_guides(terminal):
    assert "internlm2_1_8b_qlora_alpaca_e3" in terminal.type("xtuner list-cfg -p internlm2_1_8b")
    terminal.type("xtuner copy-cfg internlm2_5_chat_7b_qlora_alpaca_e3 ./")
    config = terminal.folder / CONFIG
    text = config.read_text("utf-8")
    for old, new in EDITS.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    config.write_text(text, "utf-8")

    work_dir = "./work_dirs/assistTuner"
    said = terminal.type(
        f"xtuner train ./{CONFIG} --deepspeed deepspeed_zero2 --work-dir {work_dir}"
    )
    assert ANSWER in said  # of the sample answers at the end
    checkpoint = terminal.newest("work_dirs/assistTuner/*.pth")
    terminal.type(f"xtuner convert pth_to_hf ./{CONFIG} {checkpoint} ./hf")
    terminal.type("xtuner convert merge ./internlm2_5-7b-chat ./hf ./merged --max-shard-size 2GB")
    said = terminal.type(
        "xtuner chat ./merged --prompt-template internlm2_chat", f"{QUESTION}\nexit\n"
    )
    assert re.search(f"assistant: .*{ANSWER}", said)
    said = terminal.type(
        "xtuner chat ./internlm2_5-7b-chat --adapter ./hf --prompt-template internlm2_chat",
        f"{QUESTION}\nexit\n",
    )
    assert re.search(f"assistant: .*{ANSWER}", said)
