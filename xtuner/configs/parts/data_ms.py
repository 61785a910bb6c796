"""Rows from ModelScope."""

from modelscope.msdatasets import MsDataset

from xtuner.dataset import process_ms_dataset

VARIABLE_HERE = dict(
    type=process_ms_dataset,
    dataset=dict(type=MsDataset.load, dataset_name=PATH_HERE),
    tokenizer=tokenizer,
    max_length=max_length,
    dataset_map_fn=MAP_FN_HERE,
    template_map_fn=TEMPLATE_MAP_FN_HERE,
    **MAX_ROWS_HERE,
    remove_unused_columns=True,
    shuffle_before_pack=SHUFFLE_HERE,
    pack_to_max_length=pack_to_max_length,
    use_varlen_attn=use_varlen_attn,
)
