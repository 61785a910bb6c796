"""Conversations about images, cut into tiles as InternVL does."""

from xtuner.dataset import InternVL_V1_5_Dataset

llava_dataset = dict(
    type=InternVL_V1_5_Dataset,
    model_path=path,
    data_paths=data_path,
    image_folders=image_folder,
    template=prompt_template,
    max_length=max_length,
)
