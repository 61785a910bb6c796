"""``xtuner preprocess sft``: the folder holds the same samples, and its config trains on them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from mmengine.config import ConfigDict

from xtuner.entry_point import main

ROWS = '''
from datasets import Dataset


class Images:
    """Stands for an image dataset: texts prepared, images not."""

    def __init__(self, data_path, image_folder, offline_processed_text_folder=None):
        self.text_data = make()

    def __len__(self):
        return len(self.text_data)


def make():
    return Dataset.from_list([{"input_ids": [1, 2], "labels": [-100, 2], "length": 2}] * 3)
'''


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "rows_to_prepare", raising=False)
    Path("rows_to_prepare.py").write_text(ROWS)
    Path("config.py").write_text(
        "from rows_to_prepare import Images, make\n"
        "batch_size = 2\n"
        "train_dataset = dict(type=make)\n"
        "train_dataloader = dict(batch_size=batch_size, dataset=train_dataset)\n"
    )
    return tmp_path


@pytest.mark.parametrize("words", [["out"], ["--save-folder", "out"]])
def test_the_written_config_opens_the_same_samples(workspace, capsys, words):
    from xtuner.config import load_config
    from xtuner.registry import BUILDER

    command = "sft" if words == ["out"] else "untokenized"
    assert main(["preprocess", command, "config.py", *words]) == 0
    assert "xtuner train out/config.py" in capsys.readouterr().out
    cfg = load_config("out/config.py")
    assert cfg.train_dataloader.batch_size == 2
    settings = cfg._to_lazy_dict()["train_dataloader"]["dataset"]
    dataset = BUILDER.build(ConfigDict(settings))
    assert dataset[:]["labels"] == [[-100, 2]] * 3


def test_images_get_their_texts_from_the_folder(workspace):
    from xtuner.config import load_config

    text = Path("config.py").read_text()
    images = 'dict(type=Images, data_path="a.json", image_folder="i")'
    Path("config.py").write_text(text.replace("dict(type=make)", images))
    assert main(["preprocess", "llava", "config.py", "out"]) == 0
    dataset = load_config("out/config.py")._to_lazy_dict()["train_dataloader"]["dataset"]
    assert dataset["data_path"] is None
    assert Path(dataset["offline_processed_text_folder"]) == workspace / "out" / "dataset"
    assert dataset["image_folder"] == "i"


def test_llava_refuses_a_text_config(workspace, capsys):
    assert main(["preprocess", "llava", "config.py", "out"]) == 1
    assert "xtuner preprocess sft" in capsys.readouterr().err


def test_the_folder_is_asked_for(workspace, capsys):
    assert main(["preprocess", "sft", "config.py"]) == 2
    assert "the folder to write is missing" in capsys.readouterr().err
