"""A run with code of the user's own is complete in its work dir: all goes on without his files."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from xtuner.entry_point import main

CONFIG = """
import torch
from datasets import load_dataset
from mmengine.config import read_base
from mmengine.dataset import DefaultSampler
from mmengine.hooks import CheckpointHook, Hook
from mmengine.optim import AmpOptimWrapper
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer
from xtuner.dataset import process_hf_dataset
from xtuner.dataset.collate_fns import default_collate_fn
from xtuner.dataset.map_fns import template_map_fn_factory
from xtuner.engine.runner import TrainLoop
from xtuner.model import SupervisedFinetune
from xtuner.utils import PROMPT_TEMPLATE

with read_base():
    from .map_of_mine import map_fn
from .bell_of_mine import Bell

class Ring(Hook):
    def after_train(self, runner):
        print("ring", torch.float32)

prompt_template = PROMPT_TEMPLATE.qwen_chat
accumulative_counts = 1
base = {base!r}
tokenizer = dict(type=AutoTokenizer.from_pretrained, pretrained_model_name_or_path=base)
model = dict(
    type=SupervisedFinetune,
    llm=dict(type=AutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path=base,
             dtype=torch.float32),
)
train_dataloader = dict(
    batch_size=1,
    dataset=dict(
        type=process_hf_dataset,
        dataset=dict(type=load_dataset, path="json", data_files={rows!r}),
        tokenizer=tokenizer,
        max_length=64,
        dataset_map_fn=map_fn,
        template_map_fn=dict(type=template_map_fn_factory, template=prompt_template),
        remove_unused_columns=True,
        pack_to_max_length=False,
    ),
    sampler=dict(type=DefaultSampler, shuffle=False),
    collate_fn=dict(type=default_collate_fn),
)
optim_wrapper = dict(
    type=AmpOptimWrapper, optimizer=dict(type=AdamW, lr=1e-4), dtype="float32",
    accumulative_counts=accumulative_counts,
)
train_cfg = dict(type=TrainLoop, max_iters=2)
custom_hooks = [dict(type=Bell), dict(type=Ring)]
default_hooks = dict(checkpoint=dict(type=CheckpointHook, by_epoch=False, interval=1))
randomness = dict(seed=0)
"""
MAP = """
from words_of_mine import PREFIX
def map_fn(row):
    return {"conversation": [{"input": PREFIX + row["q"], "output": row["a"]}]}
"""
BELL = """
from mmengine.hooks import Hook
class Bell(Hook):
    def before_train(self, runner):
        print("bell of mine")
"""
MINE = ("map_of_mine", "bell_of_mine", "words_of_mine")


def say(capsys, *words: object) -> str:
    """What a command of this process prints; it must succeed."""
    capsys.readouterr()
    status = main([str(word) for word in words])
    said = capsys.readouterr()
    assert status == 0, said.err
    return said.out + said.err


@pytest.fixture
def user(tmp_path, tiny_llama):
    """A folder with a config, a map function, a hook and rows."""
    folder = tmp_path / "我的 files"
    folder.mkdir()
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"q": f"{n}", "a": "yes"}) + "\n" for n in range(2)))
    (folder / "my_cfg.py").write_text(
        CONFIG.replace("{base!r}", repr(str(tiny_llama))).replace("{rows!r}", repr(str(rows)))
    )
    for name, text in zip(MINE, (MAP, BELL, "PREFIX = 'Q: '\n"), strict=True):
        (folder / f"{name}.py").write_text(text)
    yield folder
    for name in MINE:
        sys.modules.pop(name, None)


def test_the_work_dir_is_enough(user, tmp_path, capsys):
    work = tmp_path / "run of 1"
    said = say(capsys, "train", user / "my_cfg.py", "--work-dir", work)
    assert "bell of mine" in said and "ring torch.float32" in said
    assert {f"{name}.py" for name in MINE} < {file.name for file in work.iterdir()}
    assert "Q: 0" in say(capsys, "log-dataset", work / "my_cfg.py")
    for name in MINE:  # changed by the user, then gone
        (user / f"{name}.py").write_text("raise RuntimeError('the file of the user')\n")
        sys.modules.pop(name, None)
    kept = shutil.copytree(user, tmp_path / "kept")
    commands = re.findall(r"^ *(xtuner .*)$", said, re.M)
    (convert,) = [command for command in commands if "pth_to_hf" in command]
    say(capsys, *shlex.split(convert)[1:])
    shutil.rmtree(user)
    say(capsys, "convert", "pth_to_hf", work / "iter_2.pth", tmp_path / "hf")
    say(capsys, "convert", "pth_to_hf", kept / "my_cfg.py", work / "iter_2.pth", tmp_path / "hf2")
    say(capsys, "check-template", tmp_path / "hf")
    say(capsys, "test", work / "my_cfg.py", "--checkpoint", work / "iter_2.pth")
    (work / "iter_2.pth").unlink()
    words = [work / "my_cfg.py", "--work-dir", work]
    assert "bell of mine" in say(capsys, "train", *words, "--resume")
    assert "bell of mine" in say(capsys, "train", *words[:1], "--work-dir", tmp_path / "again")
    assert Path(tmp_path / "again" / "words_of_mine.py").is_file()
