"""Settings of data with images, before anything runs."""

import pytest

from xtuner.config.check import check

CONFIG = """
from datasets import load_dataset
from transformers import AutoModelForCausalLM
from xtuner.dataset import VisionLanguageDataset
from xtuner.dataset.collate_fns import default_collate_fn, vision_language_collate_fn
from xtuner.model import SupervisedFinetune, VisionLanguageFinetune
from xtuner.tokenization.processor import load_processor

processor = dict(type=load_processor, name_or_path="org/model")
model = dict(type=VisionLanguageFinetune, use_varlen_attn=True)
train_dataloader = dict(
    batch_size=1,
    dataset=dict(
        type=VisionLanguageDataset,
        dataset=dict(type=load_dataset, path="json", data_files="rows.jsonl"),
        processor=processor,
        image_folder="photos",
        max_length=2048,
        long_samples="shrink",
        max_pixels=1000,
    ),
    collate_fn=dict(
        type=vision_language_collate_fn, processor=processor, use_varlen_attn=True
    ),
)
"""


@pytest.fixture
def codes(tmp_path, monkeypatch):
    """A function: lines after the config → the codes and keys of what is wrong with it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "photos").mkdir()

    def found(lines=""):
        (tmp_path / "config.py").write_text(CONFIG + lines)
        problems = check(tmp_path / "config.py")
        keys = {(problem.code, str(problem.where.key)) for problem in problems}
        return {(c, key) for c, key in keys if c == "XT0345" or key.startswith("train_dataloader")}

    return found


DATASET = "train_dataloader['dataset']"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", set()),
        (
            f"{DATASET}['image_folder'] = 'none'",
            {("XT0317", "train_dataloader.dataset.image_folder")},
        ),
        (f"{DATASET}['max_length'] = '2048'", {("XT0326", "train_dataloader.dataset.max_length")}),
        (
            f"{DATASET}['dataset_map_fn'] = True",
            {("XT0324", "train_dataloader.dataset.dataset_map_fn")},
        ),
        (f"{DATASET}['max_pixel'] = 5", {("XT0102", "train_dataloader.dataset.max_pixel")}),
        (
            "model['use_varlen_attn'] = False",
            {
                ("XT0303", "train_dataloader.dataset.pack_to_max_length"),
                ("XT0303", "train_dataloader.collate_fn.use_varlen_attn"),
            },
        ),
        ("model['type'] = SupervisedFinetune", {("XT0345", "model.type")}),
        (
            "train_dataloader['collate_fn'] = dict(type=default_collate_fn, use_varlen_attn=True)",
            {("XT0345", "train_dataloader.collate_fn.type")},
        ),
        (
            "train_dataloader.pop('collate_fn')",
            {("XT0345", "train_dataloader.collate_fn.type")},
        ),
    ],
)
def test_settings(line, expected, codes):
    assert codes(line) == expected
