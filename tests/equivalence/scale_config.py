# Ten optimizer steps of a tiny model; how many tokens a row trains differs from row to row.
from mmengine.dataset import DefaultSampler
from mmengine.hooks import CheckpointHook, DistSamplerSeedHook, LoggerHook
from mmengine.optim import AmpOptimWrapper
from peft import LoraConfig
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from tests.equivalence.scale_rows import LabelledRows
from xtuner.dataset.collate_fns import default_collate_fn
from xtuner.engine.hooks import EvaluateChatHook, HFCheckpointHook
from xtuner.engine.runner import TrainLoop
from xtuner.model import SupervisedFinetune

base = "set by the test"
accumulative_counts = 4
steps = 10
adapter = False
bits = False
saved = False
hooks = False

model = dict(
    type=SupervisedFinetune,
    llm=dict(type=AutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path=base),
    use_activation_checkpointing=False,
)
if bits:
    model["llm"]["quantization_config"] = dict(type=BitsAndBytesConfig, load_in_4bit=True)
if adapter:
    model["lora"] = dict(type=LoraConfig, r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
if saved:
    model["lora"]["modules_to_save"] = ["lm_head"]
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
param_scheduler = []
train_cfg = dict(type=TrainLoop, max_iters=accumulative_counts * steps)
default_hooks = dict(
    logger=dict(type=LoggerHook, log_metric_by_epoch=False, interval=1),
    checkpoint=dict(type=CheckpointHook, by_epoch=False, interval=accumulative_counts * 5),
    sampler_seed=dict(type=DistSamplerSeedHook),
)
env_cfg = dict(dist_cfg=dict(backend="gloo"))
randomness = dict(seed=3)
log_processor = dict(by_epoch=False)
custom_hooks = []
if hooks:
    tokenizer = dict(type=AutoTokenizer.from_pretrained, pretrained_model_name_or_path=base)
    custom_hooks = [
        dict(type=HFCheckpointHook),
        dict(
            type=EvaluateChatHook,
            tokenizer=tokenizer,
            evaluation_inputs=["one two"],
            max_new_tokens=4,
        ),
    ]
