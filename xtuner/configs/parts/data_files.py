"""Rows from one or more files."""

from datasets import load_dataset

from xtuner.dataset import process_hf_dataset

VARIABLE_HERE = dict(
    type=process_hf_dataset,
    dataset=dict(type=load_dataset, **LOCAL_FILES_HERE),
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
