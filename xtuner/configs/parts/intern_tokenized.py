"""Rows that InternLM's tools have turned into tokens already."""

from xtuner.dataset.intern_repo import (
    build_packed_dataset,
    load_intern_repo_tokenized_dataset,
)

VARIABLE_HERE = dict(
    type=build_packed_dataset,
    dataset_cfg=dict(
        type=load_intern_repo_tokenized_dataset,
        data_order_path=None,
        folder=PATH_HERE,
        min_length=0,
        file_type=".bin",
    ),
    packed_length=max_length,
    seed=1024,
)
