"""Batches."""

from mmengine.dataset import DefaultSampler

from xtuner.parallel.sequence import SequenceParallelSampler

sampler = SequenceParallelSampler if sequence_parallel_size > 1 else DefaultSampler
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=dataloader_num_workers,
    dataset=DATASET_HERE,
    sampler=dict(type=sampler, shuffle=True),
    collate_fn=dict(type=COLLATE_HERE, use_varlen_attn=use_varlen_attn),
)
