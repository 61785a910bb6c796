# A run of three epochs of eleven micro-batches; the optimizer steps cross the epochs' cu_seqlens.
from mmengine.dataset import DefaultSampler
from mmengine.hooks import (
    CheckpointHook,
    DistSamplerSeedHook,
    IterTimerHook,
    LoggerHook,
    ParamSchedulerHook,
)
from mmengine.optim import AmpOptimWrapper, CosineAnnealingLR, LinearLR
from torch.optim import AdamW

from tests.equivalence.toy import ToyModel, ToyRows, collate
from xtuner.engine.runner import TrainLoop, ValLoop

rows = 22
seed_of_rows = 0
max_epochs = 3
accumulative_counts = 2
save_steps = 4
save_total_limit = 2
by_epoch = False
lr = 1e-2

model = dict(type=ToyModel)
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    dataset=dict(type=ToyRows, count=rows, seed=seed_of_rows),
    sampler=dict(type=DefaultSampler, shuffle=True),
    collate_fn=dict(type=collate),
)
optim_wrapper = dict(
    type=AmpOptimWrapper,
    optimizer=dict(type=AdamW, lr=lr),
    clip_grad=dict(max_norm=1),
    accumulative_counts=accumulative_counts,
    dtype="float32",
)
param_scheduler = [
    dict(type=LinearLR, start_factor=0.1, by_epoch=False, begin=0, end=5),
    dict(type=CosineAnnealingLR, eta_min=0.0, by_epoch=True, begin=0, T_max=max_epochs),
]
train_cfg = dict(type=TrainLoop, max_epochs=max_epochs, val_interval=8)
val_dataloader = dict(
    batch_size=2,
    num_workers=0,
    dataset=dict(type=ToyRows, count=5, seed=9),
    sampler=dict(type=DefaultSampler, shuffle=False),
    collate_fn=dict(type=collate),
)
val_cfg = dict(type=ValLoop)
val_evaluator = []  # the loss
default_hooks = dict(
    timer=dict(type=IterTimerHook),
    logger=dict(type=LoggerHook, log_metric_by_epoch=False, interval=1),
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(
        type=CheckpointHook, by_epoch=by_epoch, interval=save_steps, max_keep_ckpts=save_total_limit
    ),
    sampler_seed=dict(type=DistSamplerSeedHook),
)
env_cfg = dict(cudnn_benchmark=False, dist_cfg=dict(backend="gloo"))
visualizer = None
log_level = "INFO"
load_from = None
resume = False
randomness = dict(seed=3, deterministic=False)
log_processor = dict(by_epoch=False)
