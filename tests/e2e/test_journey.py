"""The journey of the README, typed: list, copy, edit, train, convert, merge, chat."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.forked import LIMIT, ROOT, run

BASE = "./work_dirs/quickstart_base"


def in_a_shell(folder: Path, *words: str) -> str:
    """Start a Python as a user's shell does; what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "xtuner", *words],
        cwd=folder,
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def typed(folder: Path, *words: str, stdin: str = "", status: int = 0) -> str:
    """Run ``xtuner`` as a user does; return what it printed."""
    done = run("-m", "xtuner", *words, folder=folder, stdin=stdin, status=status)
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which ``xtuner train quickstart`` has been typed."""
    folder = tmp_path_factory.mktemp("journey")
    said = in_a_shell(folder, "train", "quickstart")
    assert "51 rows read" in said
    first, *_, last = re.findall(r"请做一下自我介绍<\|im_end\|>\n.*\n(.*)", said)
    assert "小调" not in first
    assert "小调" in last
    return folder


def test_the_end_of_a_run_tells_what_to_type_next(folder):
    run = folder / "work_dirs" / "quickstart"
    (checkpoint,) = run.glob("iter_*.pth")
    typed(folder, "convert", "pth_to_hf", str(checkpoint), "./hf")
    said = typed(
        folder, "chat", "./hf", "--prompt-template", "internlm2_chat",
        stdin="请做一下自我介绍\nRESET\nPlease introduce yourself\nexit\n",
    )  # fmt: skip
    assert re.search(r"user: 请做一下自我介绍\nassistant: .*小调", said)
    assert re.search(r"user: Please introduce yourself\nassistant: .*小调", said)
    assert {"curves.png", "metrics.jsonl", "account.json"} <= {p.name for p in run.iterdir()}


def test_names_are_listed_and_copied(tmp_path):
    said = typed(tmp_path, "list-cfg", "-p", "internlm2_1_8b")
    lines = said.splitlines()
    assert lines[0].strip("=") == "CONFIGS"
    assert lines[1] == "PATTERN: internlm2_1_8b"
    assert {"internlm2_1_8b_full_alpaca_e3", "internlm2_1_8b_qlora_alpaca_e3"} <= set(lines)
    typed(tmp_path, "copy-cfg", "internlm2_chat_1_8b_qlora_oasst1_e3", ".")
    assert (tmp_path / "internlm2_chat_1_8b_qlora_oasst1_e3_copy.py").is_file()
    assert "--force" in typed(
        tmp_path, "copy-cfg", "internlm2_chat_1_8b_qlora_oasst1_e3", ".", status=1
    )


def test_a_copy_is_edited_as_guides_say_and_trains(folder):
    """QLoRA on local rows, with the short keys of guides; then adapter, merge and chat."""
    typed(folder, "copy-cfg", "internlm2_5_chat_7b_qlora_alpaca_e3", "./")
    text = (folder / "internlm2_5_chat_7b_qlora_alpaca_e3_copy.py").read_text("utf-8")
    for line in ("pretrained_model_name_or_path = ", "alpaca_en_path = ", "evaluation_inputs = ["):
        assert f"\n{line}" in text
    for old, new in (
        (
            "dataset=dict(type=load_dataset, path=alpaca_en_path)",
            "dataset=dict(type=load_dataset, path='json', data_files=dict(train=alpaca_en_path))",
        ),
        ("dataset_map_fn=alpaca_map_fn", "dataset_map_fn=None"),
        ('alpaca_en_path = "tatsu-lab/alpaca"', 'alpaca_en_path = "my.jsonl"'),
        ("save_steps = 500", "save_steps = 100"),
        ("max_length = 2048", "max_length = 256"),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    (folder / "my.py").write_text(text, "utf-8")
    rows = [
        {"conversation": [{"system": "", "input": f"number {n}", "output": f"it is {n}"}]}
        for n in range(24)
    ]
    (folder / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    options = ["train_dataloader.batch_size=4", "optimizer.lr=1e-5", f"model.pretrained={BASE}"]
    checked = typed(folder, "check-custom-dataset", "my.py", "--cfg-options", options[2])
    assert "24" in checked
    said = typed(
        folder, "train", "my.py", "--work-dir", "out", "--gpu-id", "0", "--cfg-options", *options
    )
    assert "lr 1e-05" in said
    assert f"model: {BASE}" in said
    assert "(rows of a step: 4 x 1 x 1)" in said
    (checkpoint,) = (folder / "out").glob("iter_*.pth")
    said = typed(folder, "convert", "pth_to_hf", "my.py", str(checkpoint), "./adapter")
    assert "my with the settings of the run" in said
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    typed(folder, "convert", "merge", BASE, "./adapter", "./merged", "--max-shard-size", "2GB")
    said = typed(
        folder, "chat", "./merged", "--prompt-template", "internlm2_chat", "--max-new-tokens", "8",
        stdin="hello\nexit\n",
    )  # fmt: skip
    assert "user: hello\nassistant: " in said


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "none.py"], "there is no such config file"),
        (["train", "broken.py"], "broken.py:1: this is not valid Python"),
        (["train", "nothing.py"], "this config sets no model"),
        (["train", "internlm2_1_8b_full_alpaca_e3"], "model.pretrained=/PATH"),
        (["convert", "pth_to_hf", "quickstart", "none.pth", "out"], "no such checkpoint"),
        (["convert", "pth_to_hf", "quickstart", "damaged.pth", "out"], "is damaged"),
        (
            ["train", "quickstart_lora", "--cfg-options", "model.pretrained=/none/base"],
            "there is no folder '/none/base'",
        ),
    ],
)
def test_a_mistake_is_one_clear_message(words, expected, tmp_path):
    (tmp_path / "broken.py").write_text("model = dict(\n", "utf-8")
    (tmp_path / "nothing.py").write_text("lr = 1\n", "utf-8")
    (tmp_path / "damaged.pth").write_bytes(b"PK\x03\x04 cut off")
    said = typed(tmp_path, *words, status=1)
    assert expected in said
    assert said.count("error:") == 1
