# Four optimizer steps of DPO on eleven pairs, validated on other pairs: an odd number of each.
from mmengine.dataset import DefaultSampler
from mmengine.hooks import CheckpointHook, DistSamplerSeedHook, ParamSchedulerHook
from mmengine.optim import AmpOptimWrapper
from peft import LoraConfig
from torch.optim import AdamW
from transformers import AutoModelForCausalLM

from tests.equivalence.sequence_parallel import Pairs
from xtuner.dataset.collate_fns import preference_collate_fn
from xtuner.engine.runner import TrainLoop, ValLoop
from xtuner.model import DPO

base = "set by the test"
adapter = False
precomputed = False
peft_model = None
seed_of_pairs = 0
train_pairs = 11
val_pairs = 13
steps = 4
accumulative_counts = 1
lr = 1e-3

model = dict(
    type=DPO,
    llm=dict(type=AutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path=base),
    lora=dict(type=LoraConfig, r=4, lora_alpha=16, task_type="CAUSAL_LM") if adapter else None,
    peft_model=peft_model,
    precompute_reference=precomputed,
    use_activation_checkpointing=False,
)
train_dataloader = dict(
    batch_size=1,
    num_workers=0,
    dataset=dict(type=Pairs, count=train_pairs, seed=seed_of_pairs),
    sampler=dict(type=DefaultSampler, shuffle=True),
    collate_fn=dict(type=preference_collate_fn),
)
val_dataloader = dict(
    batch_size=2,
    num_workers=0,
    dataset=dict(type=Pairs, count=val_pairs, seed=1),
    sampler=dict(type=DefaultSampler, shuffle=False),
    collate_fn=dict(type=preference_collate_fn),
)
val_cfg = dict(type=ValLoop)
val_evaluator = []
optim_wrapper = dict(
    type=AmpOptimWrapper,
    optimizer=dict(type=AdamW, lr=lr, eps=1e-4),
    accumulative_counts=accumulative_counts,
    dtype="float32",
)
param_scheduler = []
train_cfg = dict(type=TrainLoop, max_iters=steps * accumulative_counts)
default_hooks = dict(
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(type=CheckpointHook, by_epoch=False, interval=2 * accumulative_counts),
    sampler_seed=dict(type=DistSamplerSeedHook),
)
env_cfg = dict(dist_cfg=dict(backend="gloo"))
load_from = None
randomness = dict(seed=3)
log_processor = dict(by_epoch=False)
