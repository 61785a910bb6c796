"""Batches of tokens and pixels; images are decoded in the worker processes."""

from mmengine.dataset import DefaultSampler

from xtuner.dataset.collate_fns import vision_language_collate_fn

train_dataloader = dict(
    batch_size=batch_size,
    num_workers=dataloader_num_workers,
    dataset=DATASET_HERE,
    sampler=dict(type=DefaultSampler, shuffle=True),
    collate_fn=dict(
        type=vision_language_collate_fn,
        processor=processor,
        use_varlen_attn=use_varlen_attn,
    ),
)
