# ruff: noqa: C408
# internlm-7b: QLoRA, on OpenAssistant, 3 epochs, with five-shot MMLU measured meanwhile.
#
#     xtuner train internlm_7b_qlora_oasst1_mmlu_e3_copy.py
import torch
from datasets import load_dataset
from mmengine.dataset import DefaultSampler
from mmengine.hooks import (
    CheckpointHook,
    DistSamplerSeedHook,
    IterTimerHook,
    LoggerHook,
    ParamSchedulerHook,
)
from mmengine.optim import AmpOptimWrapper, CosineAnnealingLR, LinearLR
from peft import LoraConfig
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from xtuner.dataset import process_hf_dataset
from xtuner.dataset.collate_fns import default_collate_fn, mmlu_collate_fn
from xtuner.dataset.map_fns import (
    default_map_fn,
    oasst1_map_fn,
    template_map_fn_factory,
)
from xtuner.engine.hooks import (
    DatasetInfoHook,
    EvaluateChatHook,
    VarlenAttnArgsToMessageHubHook,
)
from xtuner.engine.runner import TrainLoop
from xtuner.evaluation import MMLUMetric
from xtuner.model import SupervisedFinetune
from xtuner.parallel.sequence import SequenceParallelSampler
from xtuner.utils import PROMPT_TEMPLATE

#######################################################################
#                          PART 1  Settings                           #
#######################################################################
# Model
# a name on the Hugging Face hub or a local folder
pretrained_model_name_or_path = "internlm/internlm-7b"
use_varlen_attn = True  # samples packed into one row do not see each other

# Data
data_path = "timdettmers/openassistant-guanaco"
mmlu_data_root = "./data/mmlu/"
# chat template; use the same in `xtuner chat`
prompt_template = PROMPT_TEMPLATE.default
max_length = 2048  # tokens of a row; longer samples are truncated
pack_to_max_length = True  # pack several samples into a row, without padding

# Parallel
sequence_parallel_size = 1  # GPUs that share each row (sequence parallelism)

# Scheduler & Optimizer
batch_size = 1  # rows of a micro-batch on each GPU
accumulative_counts = 16  # micro-batches of an optimizer step
dataloader_num_workers = 0
max_epochs = 3
optim_type = AdamW
lr = 2e-4
betas = (0.9, 0.999)
weight_decay = 0
max_norm = 1  # gradients are clipped to this norm
warmup_ratio = 0.03  # share of training for the warm-up of lr

# Save
save_steps = 500  # micro-batches between checkpoints
save_total_limit = 2  # checkpoints to keep (-1: all)

# Evaluate the generation performance during the training
evaluation_freq = 500  # micro-batches between sample outputs
evaluate_steps = 500  # batches between measurements of MMLU
SYSTEM = ""
evaluation_inputs = [
    "请给我介绍五个上海的景点",
    "Please tell me five scenic spots in Shanghai",
]

#######################################################################
#                      PART 2  Model & Tokenizer                      #
#######################################################################
tokenizer = dict(
    type=AutoTokenizer.from_pretrained,
    pretrained_model_name_or_path=pretrained_model_name_or_path,
    padding_side="right",
)

model = dict(
    type=SupervisedFinetune,
    use_varlen_attn=use_varlen_attn,
    llm=dict(
        type=AutoModelForCausalLM.from_pretrained,
        pretrained_model_name_or_path=pretrained_model_name_or_path,
        dtype=torch.bfloat16,
        quantization_config=dict(
            type=BitsAndBytesConfig,
            load_in_4bit=True,
            load_in_8bit=False,
            llm_int8_threshold=6.0,
            llm_int8_has_fp16_weight=False,
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_quant_type="nf4",
        ),
    ),
    lora=dict(
        type=LoraConfig,
        r=64,
        lora_alpha=16,
        lora_dropout=0.1,
        bias="none",
        task_type="CAUSAL_LM",
    ),
)

#######################################################################
#                    PART 3  Dataset & Dataloader                     #
#######################################################################
train_dataset = dict(
    type=process_hf_dataset,
    dataset=dict(type=load_dataset, path=data_path),
    tokenizer=tokenizer,
    max_length=max_length,
    dataset_map_fn=oasst1_map_fn,
    template_map_fn=dict(type=template_map_fn_factory, template=prompt_template),
    remove_unused_columns=True,
    shuffle_before_pack=True,
    pack_to_max_length=pack_to_max_length,
    use_varlen_attn=use_varlen_attn,
)

sampler = SequenceParallelSampler if sequence_parallel_size > 1 else DefaultSampler
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=dataloader_num_workers,
    dataset=train_dataset,
    sampler=dict(type=sampler, shuffle=True),
    collate_fn=dict(type=default_collate_fn, use_varlen_attn=use_varlen_attn),
)

mmlu_fs_dataset = dict(
    type=load_dataset,
    path="json",
    data_files=dict(
        val=mmlu_data_root + "five_shot_mmlu_val.json",
        test=mmlu_data_root + "five_shot_mmlu_test.json",
    ),
)

val_mmlu_fs = dict(
    type=process_hf_dataset,
    dataset=mmlu_fs_dataset,
    tokenizer=tokenizer,
    dataset_map_fn=default_map_fn,
    max_length=max_length,
    pack_to_max_length=False,
    split="val",
    input_ids_with_output=False,
)

val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    dataset=val_mmlu_fs,
    sampler=dict(type=DefaultSampler, shuffle=False),
    collate_fn=dict(type=mmlu_collate_fn),
)

val_evaluator = dict(type=MMLUMetric, tokenizer=tokenizer, prefix="mmlu_fs_val")

test_mmlu_fs = dict(
    type=process_hf_dataset,
    dataset=mmlu_fs_dataset,
    tokenizer=tokenizer,
    dataset_map_fn=default_map_fn,
    max_length=max_length,
    pack_to_max_length=False,
    split="test",
    input_ids_with_output=False,
)

test_dataloader = dict(
    batch_size=1,
    num_workers=0,
    dataset=test_mmlu_fs,
    sampler=dict(type=DefaultSampler, shuffle=False),
    collate_fn=dict(type=mmlu_collate_fn),
)

test_evaluator = dict(type=MMLUMetric, tokenizer=tokenizer, prefix="mmlu_fs_test")

#######################################################################
#                    PART 4  Scheduler & Optimizer                    #
#######################################################################
optim_wrapper = dict(
    type=AmpOptimWrapper,
    optimizer=dict(type=optim_type, lr=lr, betas=betas, weight_decay=weight_decay),
    clip_grad=dict(max_norm=max_norm, error_if_nonfinite=False),
    accumulative_counts=accumulative_counts * sequence_parallel_size,
    loss_scale="dynamic",
    dtype="bfloat16",
)

param_scheduler = [
    dict(
        type=LinearLR,
        start_factor=1e-5,
        by_epoch=True,
        begin=0,
        end=warmup_ratio * max_epochs,
        convert_to_iter_based=True,
    ),
    dict(
        type=CosineAnnealingLR,
        eta_min=0.0,
        by_epoch=True,
        begin=warmup_ratio * max_epochs,
        end=max_epochs,
        convert_to_iter_based=True,
    ),
]

train_cfg = dict(
    type=TrainLoop,
    max_epochs=max_epochs,
    val_interval=evaluate_steps,
)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

#######################################################################
#                           PART 5  Runtime                           #
#######################################################################
custom_hooks = [
    dict(type=DatasetInfoHook, tokenizer=tokenizer),
    dict(
        type=EvaluateChatHook,
        tokenizer=tokenizer,
        every_n_iters=evaluation_freq,
        evaluation_inputs=evaluation_inputs,
        system=SYSTEM,
        prompt_template=prompt_template,
    ),
    dict(type=VarlenAttnArgsToMessageHubHook),
]

default_hooks = dict(
    timer=dict(type=IterTimerHook),
    logger=dict(type=LoggerHook, log_metric_by_epoch=False, interval=10),
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(
        type=CheckpointHook,
        by_epoch=False,
        interval=save_steps,
        max_keep_ckpts=save_total_limit,
    ),
    sampler_seed=dict(type=DistSamplerSeedHook),
)

env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)

visualizer = None
# Curves in TensorBoard; wandb, swanlab and others likewise:
# visualizer = dict(
#     type="Visualizer", vis_backends=[dict(type="TensorboardVisBackend")]
# )
log_level = "INFO"
load_from = None
resume = False
randomness = dict(seed=None, deterministic=False)
log_processor = dict(by_epoch=False)
