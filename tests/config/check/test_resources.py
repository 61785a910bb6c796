"""Few steps, little disk and tokens without embeddings are known before a run."""

from __future__ import annotations

import json
import re
from collections import namedtuple

import pytest

from tests.config.check.rules import findings
from tests.helpers.tiny import make_tokenizer
from xtuner.config.check import resources
from xtuner.config.check.resources import (
    few_optimizer_steps,
    little_disk,
    tokens_without_embedding,
    vocabulary_size,
)

DATA = """
train_dataloader = dict(batch_size=1, dataset=dict(type=process_hf_dataset, max_length=2048,
    pack_to_max_length={pack}, dataset=dict(type=load_dataset, path='{path}', data_files={file!r})))
optim_wrapper = dict(accumulative_counts={counts})
train_cfg = dict(type=TrainLoop, max_epochs=3)
"""
ROW = json.dumps({"conversation": [{"input": "q", "output": "a"}]})


def steps_found(text: str) -> int | None:
    found = findings(few_optimizer_steps, text)
    if not found:
        return None
    steps = re.match(r"(at most )?(\d+) optimizer steps", found[0].message)
    assert (steps[1] is not None) == found[0].key.endswith("max_epochs")
    return int(steps[2])


@pytest.mark.parametrize(
    ("name", "content", "pack", "counts", "steps"),
    [
        ("a.jsonl", f"{ROW}\n" * 60, False, 16, 12),
        ("a.jsonl", f"{ROW}\n\n" * 60, False, 16, 12),
        ("a.json", f"[{', '.join([ROW] * 60)}]", False, 16, 12),
        ("a.jsonl", f"{ROW}\n" * 60, False, 1, None),  # 180 steps
        ("a.jsonl", f"{ROW}\n" * 120, False, 16, None),  # 23 steps
        ("a.jsonl", f"{ROW}\n" * 60, True, 1, 12),  # at most 4 packs
        ("a.jsonl", f"{ROW}\n" * 80, "False, max_dataset_length=60", 16, 12),
        ("a.jsonl", f"{ROW}\n" * 75, "False, val_size=0.2", 16, 12),
        ("a.jsonl", f"{ROW}\n" * 90, "False, val_size=30", 16, 12),
        ("a.csv", "text\n" + '"a\nb"\n' * 59, False, 16, 12),
        ("a.jsonl", "[broken", False, 16, None),
        ("a.parquet", "?", False, 16, None),
    ],
)
def test_rows_of_small_files_are_counted(name, content, pack, counts, steps, tmp_path):
    (tmp_path / name).write_text(content)
    path = {"jsonl": "json"}.get(name.partition(".")[2], name.partition(".")[2])
    text = DATA.format(pack=pack, path=path, file=str(tmp_path / name), counts=counts)
    assert steps_found(text) == steps


def test_rows_that_cannot_be_counted_give_no_warning(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text(f"{ROW}\n" * 60)
    text = DATA.format(pack=False, path="json", file=str(tmp_path / "a.jsonl"), counts=16)
    assert steps_found(text) == 12
    assert steps_found(text.replace("'json'", "'org/name'")) is None
    monkeypatch.setattr(resources, "LARGEST_COUNTED", 100)
    assert steps_found(text) is None


def test_iterations_need_no_rows():
    text = "train_dataloader = dict(batch_size=1)\noptim_wrapper = dict(accumulative_counts=16)\n"
    assert steps_found(f"{text}train_cfg = dict(type=TrainLoop, max_iters=64)") == 4
    assert steps_found(f"{text}train_cfg = dict(type=TrainLoop, max_iters=320)") is None


MODEL = """
model = dict(type=SupervisedFinetune, llm=dict(pretrained_model_name_or_path={base!r}){more})
tokenizer = dict(pretrained_model_name_or_path={base!r})
default_hooks = dict(checkpoint=dict(interval=10, by_epoch=False, max_keep_ckpts={keep}))
train_cfg = dict(type=TrainLoop, max_iters={iters})
"""


@pytest.mark.parametrize(
    ("keep", "iters", "more", "count"),
    [
        (2, 100, "", 3),  # two are kept while the third is written
        (2, 20, "", 2),
        (-1, 100, "", 10),
        (2, 100, ", lora=dict(r=64)", 3),
    ],
)
def test_planned_checkpoints_and_free_space(keep, iters, more, count, tiny_llama, monkeypatch):
    text = MODEL.format(base=str(tiny_llama), keep=keep, iters=iters, more=more)
    size = resources.checkpoint_bytes(resources_context(text))
    usage = namedtuple("Usage", "total used free")
    for free, expected in ((size * count - 1, 1), (size * count + 1, 0)):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: usage(0, 0, free))
        found = findings(little_disk, text)
        assert len(found) == expected
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(0, 0, 0))
    (found,) = findings(little_disk, text)
    assert found.message.startswith(f"{count} checkpoint(s)")


def resources_context(text: str):
    from tests.config.check.rules import IMPORTS
    from xtuner.config.check.problem import Context
    from xtuner.config.document import ConfigDocument
    from xtuner.config.load import load_source
    from xtuner.config.source import ConfigSource

    source = ConfigSource(IMPORTS + text, "config.py")
    config = load_source(source)
    return Context(ConfigDocument(source, config, source, config))


def test_the_size_of_a_checkpoint_is_that_of_weights_and_moments(tiny_llama):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    text = MODEL.format(base=str(tiny_llama), keep=1, iters=9, more="")
    size = resources.checkpoint_bytes(resources_context(text))
    assert size == pytest.approx(12 * model.num_parameters(), rel=0.05)
    without = text.replace("interval=10", "interval=10, save_optimizer=False")
    assert resources.checkpoint_bytes(resources_context(without)) == size / 3
    unknown = text.replace(str(tiny_llama), "org/not-here")
    assert resources.checkpoint_bytes(resources_context(unknown)) is None


def test_tokens_that_the_model_has_no_embedding_for(tiny_llama, tmp_path):
    tokenizer = make_tokenizer()
    size = json.loads((tiny_llama / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"<{n}>" for n in range(len(tokenizer), size + 1)])
    tokenizer.save_pretrained(tmp_path)
    text = MODEL.format(base=str(tiny_llama), keep=1, iters=9, more="")
    assert findings(tokens_without_embedding, text) == []
    other = text.replace(
        f"tokenizer = dict(pretrained_model_name_or_path={str(tiny_llama)!r})",
        f"tokenizer = dict(pretrained_model_name_or_path={str(tmp_path)!r})",
    )
    (found,) = findings(tokens_without_embedding, other)
    assert found.key == "tokenizer.pretrained_model_name_or_path"
    assert f"{size} tokens; the tokenizer has 1 more: '<{size}>'" in found.message
    assert findings(tokens_without_embedding, other + "\nmodel['tokenizer'] = tokenizer\n") == []


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"vocab_size": 7}, 7),
        ({"text_config": {"vocab_size": 8}, "vocab_size": 7}, 8),
        ({"padded_vocab_size": 9, "vocab_size": 7}, 9),
        ({}, None),
    ],
)
def test_the_vocabulary_of_a_config(config, size):
    assert vocabulary_size(config) == size
