# Ten optimizer steps of a tiny language model; how many tokens a row trains differs from row to row.
from mmengine.dataset import DefaultSampler
from mmengine.hooks import CheckpointHook, DistSamplerSeedHook, LoggerHook, ParamSchedulerHook
from mmengine.optim import AmpOptimWrapper, CosineAnnealingLR
from torch.optim import AdamW
from transformers import AutoModelForCausalLM

from tests.equivalence.scale_rows import LabelledRows
from xtuner.dataset.collate_fns import default_collate_fn
from xtuner.engine.runner import TrainLoop
from xtuner.model import SupervisedFinetune

base = "set by the test"
accumulative_counts = 4
steps = 10

model = dict(
    type=SupervisedFinetune,
    llm=dict(type=AutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path=base),
    use_activation_checkpointing=False,
)
train_dataloader = dict(
    batch_size=1,
    num_workers=0,
    dataset=dict(type=LabelledRows),
    sampler=dict(type=DefaultSampler, shuffle=True),
    collate_fn=dict(type=default_collate_fn),
)
optim_wrapper = dict(
    type=AmpOptimWrapper,
    optimizer=dict(type=AdamW, lr=1e-3, weight_decay=0.01, eps=1e-4),
    clip_grad=dict(max_norm=0.5),
    accumulative_counts=accumulative_counts,
    dtype="float32",
)
param_scheduler = [dict(type=CosineAnnealingLR, eta_min=1e-4, by_epoch=False, begin=0, T_max=40)]
train_cfg = dict(type=TrainLoop, max_iters=accumulative_counts * steps)
default_hooks = dict(
    logger=dict(type=LoggerHook, log_metric_by_epoch=False, interval=1),
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(type=CheckpointHook, by_epoch=False, interval=accumulative_counts * 5),
    sampler_seed=dict(type=DistSamplerSeedHook),
)
env_cfg = dict(dist_cfg=dict(backend="gloo"))
randomness = dict(seed=3)
log_processor = dict(by_epoch=False)
