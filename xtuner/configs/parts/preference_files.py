"""Preferences from JSON-lines files."""

from xtuner.dataset.preference_dataset import (
    build_preference_dataset,
    load_jsonl_dataset,
)

VARIABLE_HERE = dict(
    type=build_preference_dataset,
    dataset=dict(type=load_jsonl_dataset, data_files=data_files),
    tokenizer=tokenizer,
    max_length=max_length,
    dataset_map_fn=MAP_FN_HERE,
    is_dpo=IS_DPO_HERE,
    is_reward=IS_REWARD_HERE,
    reward_token_id=REWARD_TOKEN_HERE,
    num_proc=4,
    use_varlen_attn=use_varlen_attn,
    **PACKED_LENGTH_HERE,
    shuffle_before_pack=True,
)
