"""InternLM's data: nothing lost in packing, order by file, damage named, every config reads it."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.tiny import save_tiny
from xtuner.config import load_config
from xtuner.dataset.collate_fns import default_collate_fn
from xtuner.dataset.intern_repo import (
    build_packed_dataset,
    load_intern_repo_tokenized_dataset,
)
from xtuner.entry_point import main
from xtuner.registry import BUILDER
from xtuner.utils.errors import UserError


def write(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    places = []
    with file.open("wb") as stream:
        for row in rows:
            places.append((stream.tell(), len(row)))
            stream.write(json.dumps({"tokens": row}).encode() + b"\n")
    with Path(f"{file}.meta").open("wb") as stream:
        np.save(stream, np.array(places, dtype=np.int64).reshape(-1, 2))


@pytest.fixture
def folder(tmp_path):
    numbers = itertools.count(1)
    for name, lengths in (("b", [3, 40, 9]), ("a", [7, 5, 16, 1])):
        rows = [[next(numbers) * (-1 if n < 2 else 1) for n in range(size)] for size in lengths]
        write(tmp_path / "sub" / f"{name}.bin", rows)
    return tmp_path


def tokens_of(dataset):
    return sorted(token for row in dataset for token in row["input_ids"])


def test_every_token_is_in_one_pack(folder):
    packed = build_packed_dataset(
        dict(type=load_intern_repo_tokenized_dataset, folder=str(folder)), packed_length=16
    )
    rows = [packed[n] for n in range(len(packed))]
    assert tokens_of(rows) == list(range(1, 3 + 40 + 9 + 7 + 5 + 16 + 1 + 1))
    assert [row["length"] for row in rows] == packed.length
    assert max(packed.length) <= 16
    for row in rows:
        for start, stop in itertools.pairwise(row["cumulative_len"]):
            assert row["position_ids"][start:stop] == list(range(stop - start))
    batch = default_collate_fn(rows[:2], use_varlen_attn=True)["data"]
    assert batch["max_seqlen"] <= 16


def test_negative_tokens_have_no_loss(folder):
    (first, _) = load_intern_repo_tokenized_dataset(str(folder))
    ids, labels = first.sample(0)
    assert ids == list(range(53, 60))
    assert labels == [-100, -100, *range(55, 60)]


def test_short_rows_are_left_out(folder):
    first, second = load_intern_repo_tokenized_dataset(str(folder), min_length=6)
    assert (first.lengths, second.lengths) == ([7, 16], [40, 9])


def test_the_order_depends_on_the_seed_alone(folder):
    parts = load_intern_repo_tokenized_dataset(str(folder))
    one, again, other = (build_packed_dataset(parts, 16, seed) for seed in (1, 1, 2))
    assert [one[n] for n in range(len(one))] == [again[n] for n in range(len(again))]
    assert one.segments != other.segments


def test_files_come_in_the_order_that_is_asked_for(folder, capsys):
    words = ["--data-folder", str(folder), "--save-folder", str(folder)]
    assert main(["preprocess", "data-order", *words]) == 0
    (order,) = folder.glob("*.txt")
    names = order.read_text("utf-8").split()
    order.write_text("\n".join(reversed(names)), "utf-8")
    first, _ = load_intern_repo_tokenized_dataset(str(folder), data_order_path=str(order))
    assert first.path.name == "b.bin"
    order.write_text("sub/c.bin\n", "utf-8")
    with pytest.raises(UserError, match=r"1 are missing .*1 of the folder"):
        load_intern_repo_tokenized_dataset(str(folder), data_order_path=str(order))


def test_damage_is_named(folder):
    file = folder / "sub" / "a.bin"
    file.write_bytes(file.read_bytes()[:20])
    first, _ = load_intern_repo_tokenized_dataset(str(folder))
    with pytest.raises(UserError) as caught:
        first.sample(1)
    assert (caught.value.where.file, caught.value.where.line) == (str(file), 2)
    (folder / "sub" / "b.bin.meta").unlink()
    with pytest.raises(UserError, match=r"\.meta cannot be read"):
        load_intern_repo_tokenized_dataset(str(folder))
    with pytest.raises(UserError, match="no file"):
        load_intern_repo_tokenized_dataset(str(folder / "none"))


@pytest.mark.parametrize("kind", ["tokenized", "untokenized"])
def test_configs_read_it(kind, folder):
    base = save_tiny(folder / "base")
    turn = {"system": "s", "input": "hello", "output": "hi"}
    rows = folder / "sub" / "rows.json"
    rows.write_text(json.dumps({"conversation": [turn]}) + "\n", "utf-8")
    options = [
        f"pretrained_model_name_or_path={base}",
        f"dataset_folder={folder / 'sub'}",
        "max_length=64",
    ]
    cfg = load_config(f"internlm2_7b_w_{kind}_dataset", options)
    made = BUILDER.build(cfg.train_dataloader.dataset)
    assert len(made) >= 1
    assert len(made[0]["input_ids"]) == len(made[0]["labels"]) == made[0]["length"]
