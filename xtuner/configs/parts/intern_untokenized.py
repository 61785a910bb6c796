"""A folder of conversations in the layout of InternLM, made into tokens here."""

from xtuner.dataset.intern_repo import (
    build_packed_dataset,
    load_intern_repo_untokenized_dataset,
)
from xtuner.dataset.map_fns import template_map_fn_factory

VARIABLE_HERE = dict(
    type=build_packed_dataset,
    dataset_cfg=dict(
        type=load_intern_repo_untokenized_dataset,
        data_order_path=None,
        folder=PATH_HERE,
        tokenizer=tokenizer,
        max_length=max_length,
        template_map_fn=dict(type=template_map_fn_factory, template=prompt_template),
        file_type=".json",
    ),
    packed_length=max_length,
    seed=1024,
)
