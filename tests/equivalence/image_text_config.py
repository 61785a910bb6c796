# A few optimizer steps of a tiny vision-language model on rows of text, images and videos.
from datasets import load_dataset
from mmengine.dataset import DefaultSampler
from mmengine.hooks import DistSamplerSeedHook, LoggerHook, ParamSchedulerHook
from mmengine.optim import AmpOptimWrapper
from peft import LoraConfig
from torch.optim import AdamW
from transformers import AutoModelForImageTextToText

from tests.helpers.videos import load_with_videos
from xtuner.dataset import VisionLanguageDataset, VisionLanguagePreferenceDataset
from xtuner.dataset.collate_fns import vision_language_collate_fn
from xtuner.engine.runner import TrainLoop
from xtuner.model import VisionLanguageDPO, VisionLanguageFinetune

base = "set by the test"
data_files = "set by the test"
adapter = False
frozen = False  # the visual encoder and the projector
packed = False
pairs = False  # of answers, for DPO
ways = 1  # processes
steps = 3

processor = dict(type=load_with_videos, name_or_path=base)
model = dict(
    type=VisionLanguageDPO if pairs else VisionLanguageFinetune,
    llm=dict(type=AutoModelForImageTextToText.from_pretrained, pretrained_model_name_or_path=base),
    processor=processor,
    lora=dict(type=LoraConfig, r=4, lora_alpha=16, task_type="CAUSAL_LM") if adapter else None,
    freeze_visual_encoder=adapter or frozen,
    freeze_projector=frozen,
    use_varlen_attn=packed,
)
train_dataloader = dict(
    batch_size=1,
    num_workers=0,
    dataset=dict(
        type=VisionLanguagePreferenceDataset if pairs else VisionLanguageDataset,
        dataset=dict(type=load_dataset, path="json", data_files=data_files),
        processor=processor,
        max_length=66,
        pack_to_max_length=packed and not pairs,
    ),
    sampler=dict(type=DefaultSampler, shuffle=False),
    collate_fn=dict(type=vision_language_collate_fn, processor=processor, use_varlen_attn=packed),
)
accumulative_counts = 4 // ways
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
