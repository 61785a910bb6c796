"""``xtuner preprocess arxiv``, ``refcoco`` and ``data-order``: raw files in, data out."""

from __future__ import annotations

import json
import os
import pickle

import pytest

from xtuner.entry_point import main


def paper(identifier, categories, day):
    return {"id": identifier, "title": "t", "abstract": "a", "categories": categories,
            "update_date": day}  # fmt: skip


def test_arxiv_keeps_papers_of_a_category_since_a_day(tmp_path, capsys):
    source, target = tmp_path / "dump.json", tmp_path / "out" / "papers.json"
    papers = [
        paper("1", "math.CO cs.CL", "2021-05-01"),
        paper("2", "math.CO", "2021-05-01"),
        paper("3", "cs.CV", "2019-12-31"),
        paper("4", "cs.AI", "2020-01-01"),
    ]
    source.write_text("".join(json.dumps(one) + "\n" for one in papers))
    assert main(["preprocess", "arxiv", str(source), str(target)]) == 0
    assert [one["id"] for one in json.loads(target.read_text())] == ["1", "4"]
    assert "2 of 4 papers" in capsys.readouterr().out
    words = ["--categories", "math.CO", "--start-date", "2021-05-01"]
    assert main(["preprocess", "arxiv", str(source), str(target), *words]) == 0
    assert [one["id"] for one in json.loads(target.read_text())] == ["1", "2"]


def test_arxiv_names_the_line_of_a_row_that_is_no_paper(tmp_path, capsys):
    source, target = tmp_path / "dump.json", tmp_path / "papers.json"
    source.write_text(json.dumps(paper("1", "cs.AI", "2021-01-01")) + '\n{"title": "x"}\n')
    assert main(["preprocess", "arxiv", str(source), str(target)]) == 1
    assert f"{source}:2: this is no row of the arXiv metadata dump" in capsys.readouterr().err
    assert not target.exists()


@pytest.fixture
def annotations(tmp_path):
    folder = tmp_path / "ann" / "refcoco"
    folder.mkdir(parents=True)
    images = tmp_path / "coco" / "train2017"
    images.mkdir(parents=True)
    (images / "000000000007.jpg").write_bytes(b"")
    instances = {
        "images": [
            {"id": 7, "file_name": "COCO_train2014_000000000007.jpg", "width": 64, "height": 48}
        ],
        "annotations": [{"id": 70, "image_id": 7, "bbox": [1, 2, 10, 20]}],
    }
    (folder / "instances.json").write_text(json.dumps(instances))
    return folder, images


def reference(number, split):
    return {"ref_id": number, "ann_id": 70, "image_id": 7, "split": split,
            "sentences": [{"sent": "left dog"}, {"sent": "the dog"}]}  # fmt: skip


def refcoco(folder, images, out):
    return main(["preprocess", "refcoco", "--ann-path", str(folder.parent),
                 "--image-path", str(images), "--save-path", str(out)])  # fmt: skip


def test_refcoco_writes_a_file_for_each_split(annotations, tmp_path):
    folder, images = annotations
    rows = [reference(1, "train"), reference(2, "testA")]
    (folder / "refs(unc).p").write_bytes(pickle.dumps(rows, protocol=2))
    assert refcoco(folder, images, tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "train.json").read_text()) == [
        {
            "id": "refcoco-1",
            "image": "coco/train2017/000000000007.jpg",
            "width": 64,
            "height": 48,
            "bbox": [1, 2, 11, 22],
            "sents": ["left dog", "the dog"],
        }
    ]
    assert (tmp_path / "out" / "eval_refcoco_testA.json").is_file()


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


def test_refcoco_runs_nothing_that_a_file_carries(annotations, tmp_path, monkeypatch, capsys):
    folder, images = annotations
    monkeypatch.chdir(tmp_path)
    (folder / "refs(unc).p").write_bytes(pickle.dumps([Harmful()]))
    assert refcoco(folder, images, tmp_path / "out") == 1
    assert "wants to run" in capsys.readouterr().err
    assert not (tmp_path / "harmed").exists()


def test_data_order_lists_files_relative_and_sorted(tmp_path):
    for name in ("b/2.bin", "a/10.bin", "a/1.bin", "a/1.bin.meta"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert main(["preprocess", "data-order", "--data-folder", str(tmp_path)]) == 0
    assert (tmp_path / "data_order.txt").read_text() == "a/1.bin\na/10.bin\nb/2.bin\n"
    assert main(["preprocess", "data-order", "--data-folder", str(tmp_path / "a"),
                 "--file-type", ".xyz"]) == 1  # fmt: skip
