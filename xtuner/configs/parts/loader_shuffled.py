"""Batches of images in any order."""

from mmengine.dataset import DefaultSampler
from xtuner.dataset.collate_fns import default_collate_fn

train_dataloader = dict(
    batch_size=batch_size,
    num_workers=dataloader_num_workers,
    pin_memory=True,
    dataset=DATASET_HERE,
    sampler=dict(type=DefaultSampler, shuffle=True),
    collate_fn=dict(type=default_collate_fn),
)
