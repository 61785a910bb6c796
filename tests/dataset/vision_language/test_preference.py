"""Pairs of answers about images: the layouts that people have, what is left out, and a training."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset as Table

from tests.helpers.image_text import image_text_folder, make_image
from xtuner.dataset.collate_fns import vision_language_collate_fn
from xtuner.dataset.vision_language.preference import VisionLanguagePreferenceDataset
from xtuner.entry_point import main
from xtuner.tokenization.processor import load_processor
from xtuner.utils.errors import UserError

QUESTION, GOOD, BAD = "What color?", "it is red", "it is blue"


def said(role, text):
    return {"role": role, "content": text}


LAYOUTS = {
    "texts": {"question": QUESTION, "chosen": GOOD, "rejected": BAD, "image": "a.png"},
    "TRL": {
        "prompt": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
        ],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": GOOD}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": BAD}]}],
        "images": ["a.png"],
    },
    "whole conversations": {
        "chosen": [said("user", f"<image>{QUESTION}"), said("assistant", GOOD)],
        "rejected": [said("user", f"<image>{QUESTION}"), said("assistant", BAD)],
        "images": ["a.png"],
    },
    "LLaMA-Factory": {
        "conversations": [{"from": "human", "value": f"<image>{QUESTION}"}],
        "chosen": {"from": "gpt", "value": GOOD},
        "rejected": {"from": "gpt", "value": BAD},
        "images": ["a.png"],
    },
    "ms-swift": {
        "messages": [said("user", f"<image>{QUESTION}"), said("assistant", GOOD)],
        "rejected_response": BAD,
        "images": ["a.png"],
    },
}


@pytest.fixture(scope="module")
def processor():
    return load_processor(str(image_text_folder("qwen3_vl")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("images")
    make_image(56, 56, 1).save(made / "a.png")
    return made


def dataset_of(rows, processor, folder, **settings):
    table = Table.from_list(rows)
    return VisionLanguagePreferenceDataset(table, processor, image_folder=str(folder), **settings)


def trained_text(processor, sample):
    pairs = zip(sample["input_ids"], sample["labels"], strict=True)
    return processor.tokenizer.decode([token for token, label in pairs if label >= 0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, processor, folder):
    dataset = dataset_of([LAYOUTS[layout]], processor, folder)
    (pair,) = (dataset[number] for number in range(len(dataset)))
    assert GOOD in trained_text(processor, pair["chosen"])
    assert BAD in trained_text(processor, pair["rejected"])
    prompts = {
        tuple(
            token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label < 0
        )
        for row in pair.values()
    }
    assert len(prompts) == 1
    assert [[image.size for image in images] for images in pair["chosen"]["images"]] == [[(56, 56)]]
    assert pair["rejected"]["images"] is pair["chosen"]["images"]
    assert dataset.length == [sum(len(row["input_ids"]) for row in pair.values())]


def test_batches_take_turns(processor, folder):
    dataset = dataset_of([LAYOUTS["texts"]] * 2, processor, folder)
    pairs = [dataset[0], dataset[1]]
    padded = vision_language_collate_fn(pairs, processor)["data"]
    assert len(padded["input_ids"]) == 4 and padded["images_per_sample"] == [1, 1, 1, 1]
    assert padded["rows"] == [0, 1]
    packed = vision_language_collate_fn(pairs, processor, use_varlen_attn=True)["data"]
    assert len(packed["cumulative_len"][0]) == 5


def test_pairs_that_cannot_be_used(processor, folder, caplog):
    right = LAYOUTS["texts"]
    rows = [
        right,
        {**right, "rejected": None},
        {**right, "image": "nowhere.png"},
        {**right, "chosen": "much " * 300},
    ]
    dataset = dataset_of(rows, processor, folder, max_length=128)
    assert list(dataset.table["chosen_rows"]) == [[0]]
    assert "no rejected answer" in caplog.text and "nowhere.png" in caplog.text
    with pytest.raises(UserError):
        dataset_of(rows[2:], processor, folder, max_length=128)
    with pytest.raises(UserError, match="more than max_length"):
        dataset_of(rows, processor, folder, max_length=128, long_samples="error", bad_rows="drop")


def test_settings_of_rows_that_pairs_do_not_have(processor, folder):
    """What a copied config has for rows is taken where it means the same for pairs."""
    rows = [LAYOUTS["texts"]]
    same = {"pack_to_max_length": False, "long_samples": "drop", "bad_rows": "drop"}
    assert len(dataset_of(rows, processor, folder, **same)) == 1
    with pytest.raises(UserError, match="not packed"):
        dataset_of(rows, processor, folder, pack_to_max_length=True)
    with pytest.raises(UserError, match="shrink"):
        dataset_of(rows, processor, folder, long_samples="shrink")


def test_an_image_that_breaks_off_trains_neither_answer(processor, folder):
    name = folder / "later.png"
    make_image(56, 56, 2).save(name)
    dataset = dataset_of([{**LAYOUTS["texts"], "image": "later.png"}], processor, folder)
    name.write_bytes(name.read_bytes()[:60])
    assert all(set(row["labels"]) == {-100} for row in dataset[0].values())


CONFIG = """
from datasets import load_dataset
from mmengine.dataset import DefaultSampler
from peft import LoraConfig
from torch.optim import AdamW
from transformers import AutoModelForImageTextToText

from xtuner.dataset import VisionLanguagePreferenceDataset
from xtuner.dataset.collate_fns import vision_language_collate_fn
from xtuner.engine.runner import TrainLoop
from xtuner.model import VisionLanguageDPO
from xtuner.tokenization.processor import load_processor

base = {base!r}
processor = dict(type=load_processor, name_or_path=base)
model = dict(
    type=VisionLanguageDPO,
    llm=dict(type=AutoModelForImageTextToText.from_pretrained, pretrained_model_name_or_path=base),
    processor=processor,
    lora=dict(type=LoraConfig, r=4, lora_alpha=16, task_type="CAUSAL_LM"),
    use_varlen_attn=True,
)
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    dataset=dict(
        type=VisionLanguagePreferenceDataset,
        dataset=dict(type=load_dataset, path="json", data_files={rows!r}),
        processor=processor,
        max_length=128,
    ),
    sampler=dict(type=DefaultSampler, shuffle=True),
    collate_fn=dict(
        type=vision_language_collate_fn, processor=processor, use_varlen_attn=True
    ),
)
optim_wrapper = dict(
    type="AmpOptimWrapper", optimizer=dict(type=AdamW, lr=5e-3), dtype="float32"
)
train_cfg = dict(type=TrainLoop, max_iters=8)
"""


def test_a_training_prefers_the_chosen_answers(folder, tmp_path, capsys):
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(LAYOUTS["ms-swift"]) + "\n" for _ in range(4)), "utf-8")
    config = tmp_path / "dpo.py"
    config.write_text(CONFIG.format(base=str(image_text_folder("qwen3_vl")), rows=str(rows)))
    out = tmp_path / "out"
    assert main(["train", str(config), "--work-dir", str(out)]) == 0, capsys.readouterr()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] < 0.6
    assert lines[-1]["reward_acc"] == 1.0
    hf = tmp_path / "hf"
    words = ["convert", "pth_to_hf", str(out / "dpo.py"), str(out / "epoch_4.pth"), str(hf)]
    assert main(words) == 0, capsys.readouterr()
    assert (hf / "adapter_config.json").is_file()
