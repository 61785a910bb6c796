"""``xtuner check-custom-dataset``: the command on real configs, whatever their builder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from xtuner.entry_point import main

HEAD = """
from datasets import load_dataset
from transformers import AutoTokenizer
from xtuner.dataset import (
    ConcatDataset, InternVL_V1_5_Dataset, LLaVADataset, MOSSSFTDataset, process_hf_dataset,
)
from xtuner.dataset.map_fns import alpaca_map_fn, llava_map_fn, openai_map_fn
from xtuner.dataset.preference_dataset import build_preference_dataset, load_jsonl_dataset
from xtuner.dataset.preference_dataset import orpo_dpo_mix_40k_map_fn

def rows_of(path):
    return dict(type=load_dataset, path="json", data_files=dict(train=path))

"""

ALPACA = {"instruction": "Name a river.", "input": "", "output": "The Rhine."}
CHAT = {
    "messages": [
        {"role": "user", "content": "Name a river."},
        {"role": "assistant", "content": "The Rhine."},
    ]
}


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, *rows: object) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def check(dataset: str, capsys, *words: str) -> tuple[int, dict]:
    """Status and report of a config whose dataset is this expression."""
    Path("config.py").write_text(f"{HEAD}train_dataloader = dict(dataset={dataset})\n")
    status = main(["check-custom-dataset", "config.py", "--json", *words])
    return status, json.loads(capsys.readouterr().out)


def codes(report: dict) -> dict[str, list[int]]:
    return {
        finding["code"]: [place["line"] for place in finding["places"]]
        for finding in report["findings"]
    }


ALPACA_PART = (
    "dict(type=process_hf_dataset, dataset=dict(type=load_dataset, path='json', "
    "data_files=dict(train='{file}')), dataset_map_fn=alpaca_map_fn, max_length=64)"
)


def test_clean_data_gives_status_0(workspace, capsys):
    write("a.jsonl", ALPACA)
    status, report = check(ALPACA_PART.format(file="a.jsonl"), capsys)
    assert status == 0
    assert report["clean"] is True
    assert report["rows"] == report["good"] == 1
    assert report["layouts"] == {"alpaca": 1}


def test_every_row_is_looked_at_not_only_the_first(workspace, capsys):
    rows = [{**ALPACA, "instruction": f"Name river {n}."} for n in range(300)]
    rows[299]["output"] = None
    write("a.jsonl", *rows)
    status, report = check(ALPACA_PART.format(file="a.jsonl"), capsys)
    assert status == 1
    assert codes(report) == {"wrong-type": [300]}


def test_parts_of_a_concat_dataset_each_in_its_layout(workspace, capsys):
    write("a.jsonl", ALPACA)
    write("b.jsonl", CHAT, CHAT)
    chat = ALPACA_PART.format(file="b.jsonl").replace("alpaca_map_fn", "openai_map_fn")
    joined = f"dict(type=ConcatDataset, datasets=[{ALPACA_PART.format(file='a.jsonl')}, {chat}])"
    status, report = check(joined, capsys)
    assert codes(report) == {"duplicate": [2]}
    assert report["layouts"] == {"alpaca": 1, "openai": 1 + 1}
    assert status == 0  # it can be trained on
    assert check(joined, capsys, "--strict")[0] == 1


def test_preference_data(workspace, capsys):
    ask = {"role": "user", "content": "Name a river."}
    good, bad = (
        [ask, {"role": "assistant", "content": text}] for text in ("The Rhine.", "The Moon.")
    )
    write("p.jsonl", {"chosen": good, "rejected": bad}, {"chosen": good, "rejected": good})
    dataset = (
        "dict(type=build_preference_dataset, dataset=dict(type=load_dataset, path='json', "
        "data_files='p.jsonl'), dataset_map_fn=orpo_dpo_mix_40k_map_fn)"
    )
    _, report = check(dataset, capsys)
    assert codes(report) == {"same-choice": [2]}
    write("q.jsonl", {"prompt": [ask], "chosen": good[1:], "rejected": bad[1:]})
    dataset = (
        "dict(type=build_preference_dataset, dataset=dict(type=load_jsonl_dataset, "
        "data_files=['q.jsonl']))"
    )
    assert check(dataset, capsys)[0] == 0


def image_row(name: str, text: str) -> dict:
    said = [{"from": "human", "value": text}, {"from": "gpt", "value": f"A {name}."}]
    return {"image": f"{name}.jpg", "conversations": said}


def test_image_data_its_files_and_marks(workspace, capsys):
    Path("images").mkdir()
    Path("images/dog.jpg").touch()
    rows = [image_row("dog", "<image>\nWhat?"), image_row("dog", "Who?")]
    rows.append(image_row("cat", "<image>\nWhat?"))
    Path("llava.json").write_text(json.dumps(rows, indent=1))
    dataset = (
        "dict(type=LLaVADataset, data_path='llava.json', image_folder='images', "
        "dataset_map_fn=llava_map_fn)"
    )
    _, report = check(dataset, capsys)
    found = {one["code"]: one["places"][0] for one in report["findings"]}
    assert set(found) == {"missing-image", "image-mark"}
    assert found["missing-image"]["detail"] == "images/cat.jpg"
    dataset = (
        "dict(type=InternVL_V1_5_Dataset, data_paths=['llava.json'], image_folders=['images'])"
    )
    assert set(codes(check(dataset, capsys)[1])) == {"missing-image", "image-mark"}


def test_moss_rows_are_read_as_they_are(workspace, capsys):
    Path("moss.jsonl").write_text('{"meta_instruction": "a"}\n{"meta\n')
    _, report = check("dict(type=MOSSSFTDataset, data_file='moss.jsonl')", capsys)
    assert codes(report) == {"bad-json": [2]}


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("x = 1\n", "train_dataloader.dataset"),
        ("train_dataloader = dict(batch_size=1)\n", "train_dataloader.dataset"),
        ("framework = 'huggingface'\n", "train_dataset"),
    ],
)
def test_a_config_without_a_dataset_is_refused(workspace, capsys, text, key):
    Path("config.py").write_text(text)
    assert main(["check-custom-dataset", "config.py"]) == 1
    error = capsys.readouterr().err
    assert f"config.py ({key}): the config has no training dataset" in error


def test_a_missing_file_is_refused(workspace, capsys):
    Path("config.py").write_text(
        f"{HEAD}train_dataloader = dict(dataset={ALPACA_PART.format(file='none.jsonl')})\n"
    )
    assert main(["check-custom-dataset", "config.py"]) == 1
    assert "there is no data file 'none.jsonl'" in capsys.readouterr().err


def test_the_report_fits_the_terminal_and_the_page_is_whole(workspace, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    write("a.jsonl", CHAT, {**ALPACA, "output": "</pre><script>\u200b"})
    Path("config.py").write_text(
        f"{HEAD}train_dataloader = dict(dataset={ALPACA_PART.format(file='a.jsonl')})\n"
    )
    assert main(["check-custom-dataset", "config.py", "--html", "out.html"]) == 1
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "a.jsonl:1" in out
    page = Path("out.html").read_text("utf-8")
    assert "<script>" not in page
    assert page.rstrip().endswith("</html>")


def test_demo_data_passes(monkeypatch, capsys):
    demos = Path(__file__).parent.parent.parent / "examples" / "demo_data"
    names = sorted(folder.name for folder in demos.iterdir() if folder.is_dir())
    assert names == ["multi_turn_1", "multi_turn_2", "pretrain", "single_turn"]
    for name in names:
        monkeypatch.chdir(demos / name)
        assert main(["check-custom-dataset", "config.py", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["findings"] == []
        assert report["rows"] > 0
