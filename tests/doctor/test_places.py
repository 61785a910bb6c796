"""A row of a batch is traced to its file and line, through packing and joined datasets."""

import json

from datasets import load_dataset
from mmengine.config import ConfigDict

from tests.helpers.tiny import make_tokenizer
from xtuner.dataset import ConcatDataset, process_hf_dataset
from xtuner.dataset.collate_fns import default_collate_fn
from xtuner.doctor.places import Tracer
from xtuner.registry import BUILDER


def part(file, words, tokenizer):
    rows = [{"conversation": [{"input": word, "output": word.upper()}]} for word in words]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return dict(
        type=process_hf_dataset,
        dataset=dict(type=load_dataset, path="json", data_files=dict(train=str(file))),
        tokenizer=tokenizer,
        max_length=16,
        use_varlen_attn=True,
    )


def test_rows_of_joined_datasets_keep_their_places(tmp_path):
    tokenizer = make_tokenizer()
    words = {"a": ["one", "two", "three"], "b": ["four", "five"]}
    parts = [part(tmp_path / f"{name}.jsonl", words[name], tokenizer) for name in words]
    settings = ConfigDict(type=ConcatDataset, datasets=parts)
    dataset = BUILDER.build(settings)
    batch = default_collate_fn([dataset[i] for i in range(len(dataset))], use_varlen_attn=True)
    traced = Tracer(settings)(batch["data"])
    cu_seqlens = batch["data"]["cumulative_len"][0].tolist()
    ids = batch["data"]["input_ids"][0].tolist()
    for place, start, stop in zip(traced, cu_seqlens, cu_seqlens[1:], strict=False):
        file, _, line = place.rpartition(":")
        name = file.rpartition("/")[2].removesuffix(".jsonl")
        assert words[name][int(line) - 1] in tokenizer.decode(ids[start:stop])
    assert len(set(traced)) == 5


def test_rows_of_unknown_files_keep_their_numbers():
    assert Tracer(None)({"rows": [4, 7]}) == [4, 7]
    assert Tracer(dict(type=process_hf_dataset))({"rows": [1]}) == [1]
    assert Tracer(None)({}) == []
