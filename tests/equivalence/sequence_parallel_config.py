# A few optimizer steps of a tiny model; some of the processes may share rows.
from mmengine.dataset import DefaultSampler
from mmengine.hooks import DistSamplerSeedHook, LoggerHook, ParamSchedulerHook
from mmengine.optim import AmpOptimWrapper
from peft import LoraConfig
from torch.optim import AdamW
from transformers import AutoModel, AutoModelForCausalLM

from tests.equivalence.sequence_parallel import Pairs, Rows
from xtuner.dataset.collate_fns import default_collate_fn, preference_collate_fn
from xtuner.engine.runner import TrainLoop, ValLoop
from xtuner.model import DPO, ORPO, RewardModel, SupervisedFinetune
from xtuner.parallel.sequence import SequenceParallelSampler

base = "set by the test"
kind = "sft"
packed = False
adapter = False
ahead = False  # the reference's log-probabilities are computed before the first step
sequence_parallel_size = 1
ways = 1  # groups of processes that read rows of their own
batch_size = 1
steps = 10

pairs = kind != "sft"
model = dict(
    type=dict(sft=SupervisedFinetune, dpo=DPO, orpo=ORPO, reward=RewardModel)[kind],
    llm=dict(
        type=(AutoModel if kind == "reward" else AutoModelForCausalLM).from_pretrained,
        pretrained_model_name_or_path=base,
    ),
    lora=dict(type=LoraConfig, r=4, lora_alpha=16, task_type="CAUSAL_LM") if adapter else None,
    use_activation_checkpointing=True,
    use_varlen_attn=packed,
)
if kind == "dpo":
    model["precompute_reference"] = ahead
rows = dict(type=Pairs, reward=kind == "reward") if pairs else dict(type=Rows)
collate = preference_collate_fn if pairs else default_collate_fn
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=0,
    dataset=rows,
    sampler=dict(
        type=SequenceParallelSampler if sequence_parallel_size > 1 else DefaultSampler,
        shuffle=True,
    ),
    collate_fn=dict(type=collate, use_varlen_attn=packed),
)
val_dataloader = dict(
    batch_size=batch_size,
    num_workers=0,
    dataset=dict(rows, count=7, seed=1),  # not rows of the training
    sampler=dict(type=DefaultSampler, shuffle=False),
    collate_fn=dict(type=collate, use_varlen_attn=packed),
)
val_cfg = dict(type=ValLoop)
val_evaluator = []
accumulative_counts = 4 // ways // batch_size
optim_wrapper = dict(
    type=AmpOptimWrapper,
    optimizer=dict(type=AdamW, lr=1e-3, weight_decay=0.01, eps=1e-4),
    clip_grad=dict(max_norm=1.0),
    accumulative_counts=accumulative_counts,
    dtype="float32",
)
param_scheduler = []
train_cfg = dict(type=TrainLoop, max_iters=steps * accumulative_counts)
default_hooks = dict(
    logger=dict(type=LoggerHook, log_metric_by_epoch=False, interval=1),
    param_scheduler=dict(type=ParamSchedulerHook),
    sampler_seed=dict(type=DistSamplerSeedHook),
)
env_cfg = dict(dist_cfg=dict(backend="gloo"))
randomness = dict(seed=3)
log_processor = dict(by_epoch=False)
