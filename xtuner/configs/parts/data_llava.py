"""Conversations about images."""

from xtuner.dataset import LLaVADataset
from xtuner.dataset.map_fns import llava_map_fn, template_map_fn_factory

VARIABLE_HERE = dict(
    type=LLaVADataset,
    data_path=PATH_HERE,
    image_folder=FOLDER_HERE,
    tokenizer=tokenizer,
    image_processor=image_processor,
    dataset_map_fn=llava_map_fn,
    template_map_fn=dict(type=template_map_fn_factory, template=prompt_template),
    max_length=max_length,
    pad_image_to_square=PAD_HERE,
)
