# ruff: noqa: C408
# Llama-2-7b-hf: pretraining on books of 65536 tokens each (400 steps or so),
# with a row shared by four GPUs.
#
# It needs several GPUs; on a machine with eight:
#     NPROC_PER_NODE=8 xtuner train llama2_7b_full_pgbooks_400iters_sp4_copy.py \
#         --deepspeed deepspeed_zero3
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
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoTokenizer
from xtuner.dataset import process_hf_dataset
from xtuner.dataset.collate_fns import default_collate_fn
from xtuner.engine.hooks import DatasetInfoHook, ThroughputHook
from xtuner.engine.runner import TrainLoop
from xtuner.model import SupervisedFinetune
from xtuner.parallel.sequence import SequenceParallelSampler

#######################################################################
#                          PART 1  Settings                           #
#######################################################################
# Model
# a name on the Hugging Face hub or a local folder
pretrained_model_name_or_path = "meta-llama/Llama-2-7b-hf"
use_varlen_attn = False  # a row is one book

# Data
# Rows are tokens already
data_path = "emozilla/pg_books-tokenized-bos-eos-chunked-65536"
data_files = [
    "data/train-00000-of-00136-877a1768c20d5900.parquet",
    "data/train-00001-of-00136-70d7d139dca61754.parquet",
    "data/train-00002-of-00136-62d53594e098f3d8.parquet",
    "data/train-00003-of-00136-8bd300fecc4c720e.parquet",
    "data/train-00004-of-00136-2a9456b5f975ae95.parquet",
    "data/train-00005-of-00136-ca38cf7907bb7555.parquet",
    "data/train-00006-of-00136-1ae2e4c63f3966da.parquet",
    "data/train-00007-of-00136-a00cc39a4ee65ab6.parquet",
]
max_length = 65536  # tokens of a row; longer samples are truncated
max_position_embeddings = 65536  # positions are stretched to reach so far
pack_to_max_length = False

# Parallel
sequence_parallel_size = 4  # GPUs that share each row (sequence parallelism)

# Scheduler & Optimizer
batch_size = 1  # rows of a micro-batch on each GPU
accumulative_counts = 8  # micro-batches of an optimizer step
dataloader_num_workers = 0
max_epochs = 1
optim_type = AdamW
lr = 2e-5
betas = (0.9, 0.999)
weight_decay = 0
max_norm = 1  # gradients are clipped to this norm
warmup_ratio = 0.05  # share of training for the warm-up of lr

# Save
save_steps = 500  # micro-batches between checkpoints
save_total_limit = 1  # checkpoints to keep (-1: all)

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
    max_position_embeddings=max_position_embeddings,
    llm=dict(
        type=AutoModelForCausalLM.from_pretrained,
        pretrained_model_name_or_path=pretrained_model_name_or_path,
        dtype=torch.bfloat16,
    ),
)

#######################################################################
#                    PART 3  Dataset & Dataloader                     #
#######################################################################
train_dataset = dict(
    type=process_hf_dataset,
    dataset=dict(type=load_dataset, path=data_path, data_files=data_files),
    do_dataset_tokenization=False,
    max_length=max_length,
    remove_unused_columns=True,
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
        eta_min=lr * 0.15,
        by_epoch=True,
        begin=warmup_ratio * max_epochs,
        end=max_epochs,
        convert_to_iter_based=True,
    ),
]

train_cfg = dict(type=TrainLoop, max_epochs=max_epochs)

#######################################################################
#                           PART 5  Runtime                           #
#######################################################################
custom_hooks = [
    dict(type=DatasetInfoHook, tokenizer=tokenizer),
    dict(type=ThroughputHook),
]

default_hooks = dict(
    timer=dict(type=IterTimerHook),
    logger=dict(type=LoggerHook, log_metric_by_epoch=False, interval=1),
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(
        type=CheckpointHook,
        save_optimizer=False,
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
