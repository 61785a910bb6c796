"""Data files and image folders that are not there are known before anything is prepared."""

from __future__ import annotations

import pytest

from tests.config.check.rules import findings, keys
from xtuner.config.check.data_files import no_such_data_file, require_data_files
from xtuner.config.check.problem import Context
from xtuner.config.document import ConfigDocument
from xtuner.config.load import load_source
from xtuner.config.source import ConfigSource
from xtuner.utils.errors import UserError

LLAVA = "from xtuner.dataset import InternVL_V1_5_Dataset, LLaVADataset\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "there.json").write_text("[]")
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("files", "count"),
    [
        ("'absent.json'", 1),
        ("'data/absent.json'", 1),
        ("['there.json', 'absent.json']", 1),
        ("{'train': ['absent.json'], 'test': 'there.json'}", 1),
        ("'there.json'", 0),
        ("'*.json'", 0),
        ("'https://a.b/c.json'", 0),
        ("None", 0),
    ],
)
def test_files_of_a_loader(files, count):
    loader = f"dict(type=load_dataset, path='json', data_files={files})"
    assert len(keys(no_such_data_file, f"train_dataset = {loader}")) == count
    inside = f"train_dataloader = dict(dataset=dict(type=process_hf_dataset, dataset={loader}))"
    assert len(keys(no_such_data_file, inside)) == count


def test_files_of_a_dataset_on_the_hub_are_not_looked_for_here():
    loader = "train_dataset = dict(type=load_dataset, path='org/name', data_files='a.json'{})"
    assert keys(no_such_data_file, loader.format("")) == []
    assert keys(no_such_data_file, loader.format(", data_dir='data'")) == []
    assert keys(no_such_data_file, "train_dataset = dict(type=load_dataset, path='./no')") == [
        "train_dataset.path"
    ]


def test_a_folder_of_files():
    loader = "train_dataset = dict(type=load_dataset, path='json', data_dir={}, data_files={})"
    assert keys(no_such_data_file, loader.format("'.'", "'there.json'")) == []
    assert keys(no_such_data_file, loader.format("'images'", "'there.json'")) == [
        "train_dataset.data_files"
    ]


@pytest.mark.parametrize(
    ("dataset", "missing"),
    [
        ("type=LLaVADataset, data_path='data/x.json', image_folder='images'", ["data_path"]),
        ("type=LLaVADataset, data_path='there.json', image_folder='img'", ["image_folder"]),
        (
            "type=InternVL_V1_5_Dataset, data_paths=['there.json', 'b'], image_folders=['i']",
            ["data_paths", "image_folders"],
        ),
        ("type='MyDataset', ann_file='data/x.jsonl.gz', text='a b.json'", ["ann_file"]),
        ("type='MyDataset', where='./no', name='org/name', split='a.json'", ["where"]),
        ("type='ConcatDataset', datasets=[dict(type=LLaVADataset, data_path='x')]",
         ["datasets.0.data_path"]),
    ],
)  # fmt: skip
def test_any_key(dataset, missing):
    text = f"{LLAVA}train_dataloader = dict(dataset=dict({dataset}))"
    assert keys(no_such_data_file, text) == [f"train_dataloader.dataset.{key}" for key in missing]


def test_what_before_run_makes_is_not_missing():
    text = "train_dataset = dict(type=load_dataset, path='json', data_files='made.json')\n"
    made = "before_run = [dict(type=load_dataset, path='made.json')]\n"
    assert len(findings(no_such_data_file, text)) == 1
    assert findings(no_such_data_file, text + made) == []


def test_a_file_beside_the_config_is_said(tmp_path):
    folder = tmp_path / "my configs"
    folder.mkdir()
    (folder / "my.jsonl").write_text("{}")
    text = "train_dataset = dict(type=load_dataset, path='json', data_files='my.jsonl')\n"
    file = str(folder / "c.py")
    source = ConfigSource(f"from datasets import load_dataset\n{text}", file)
    config = load_source(source)
    with pytest.raises(UserError) as error:
        require_data_files(Context(ConfigDocument(source, config, source, config)), file)
    assert f"cd '{folder}'" in error.value.hint


def test_all_are_named_before_a_run():
    text = f"\n{LLAVA}train_dataloader = dict(dataset=dict(type=LLaVADataset,\n"
    source = ConfigSource(f"{text}    data_path='x.json', image_folder='img'))\n", "c.py")
    config = load_source(source)
    with pytest.raises(UserError) as error:
        require_data_files(Context(ConfigDocument(source, config, source, config)), "c.py")
    assert "'x.json'" in error.value.message and "'img'" in error.value.message
    assert str(error.value.where) == "c.py:4"
