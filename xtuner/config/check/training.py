"""XT03xx: settings that are each valid but do not fit together."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xtuner.config.check.code import ERROR, WARNING
from xtuner.config.check.problem import Context, Finding, rule
from xtuner.config.check.values import looks_local
from xtuner.config.values import is_number, name_of
from xtuner.utils.lang import N_, tr
from xtuner.utils.templates import PROMPT_TEMPLATE

SFT = "SupervisedFinetune"
HF_DATASETS = ("process_hf_dataset", "process_ms_dataset")
TEXT_PARTS = (
    *("SupervisedFinetune", "DPO", "ORPO", "RewardModel", "LLaVAModel", "InternVL_V1_5"),
    *("None", "default_collate_fn", "mmlu_collate_fn", "preference_collate_fn"),
)
"""Models and collate functions that take no rows with images."""
WITH_IMAGES = {
    "VisionLanguageDataset": ("VisionLanguageFinetune",),
    "VisionLanguagePreferenceDataset": (
        "VisionLanguageDPO",
        "VisionLanguageORPO",
        "VisionLanguageRewardModel",
    ),
}
"""Dataset → the models for its rows."""

# A chat model's name (lower case) and the templates that it was trained with.
CHAT_FAMILIES = (
    (r"internlm2.*chat|internlm3.*instruct", {"internlm2_chat"}),
    (r"internlm-chat", {"internlm_chat"}),
    (r"qwen.*(chat|instruct)", {"qwen_chat"}),
    (r"llama-?2.*chat", {"llama2_chat"}),
    (r"llama-?3.*instruct", {"llama3_chat"}),
    (r"chatglm3-6b$", {"chatglm3"}),
    (r"chatglm2-6b$", {"chatglm2"}),
    (r"baichuan2.*chat", {"baichuan2_chat"}),
    (r"baichuan-.*chat", {"baichuan_chat"}),
    (r"gemma.*-it$", {"gemma"}),
    (r"phi-3.*instruct", {"phi3_chat"}),
    (r"zephyr", {"zephyr"}),
    (r"mixtral.*instruct", {"mixtral", "mistral"}),
    (r"mistral.*instruct", {"mistral", "mixtral"}),
    (r"vicuna", {"vicuna"}),
)
LORA_LR, FULL_LR = 1e-4, 5e-6


def base_path(context: Context) -> str:
    """The base model's path, '' when there is none."""
    for key in ("model.llm.pretrained_model_name_or_path", "model.model_path"):
        path = context.get(key)
        if isinstance(path, str):
            return path
    return ""


def local_json(folder: str, name: str) -> dict[str, Any]:
    """A JSON file of a local model folder; {} where there is none."""
    path = Path(folder).expanduser() / name
    if not folder or not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@rule(
    "XT0301",
    ERROR,
    N_("packing with other columns kept"),
    N_("Packing joins several rows into one; a column with one value per row cannot be kept."),
    wrong="train_dataset = dict(type=process_hf_dataset, pack_to_max_length=True, "
    "remove_unused_columns=False)",
    right="train_dataset = dict(type=process_hf_dataset, pack_to_max_length=True, "
    "remove_unused_columns=True)",
)
def pack_keeps_columns(context: Context) -> Iterator[Finding]:
    for key in context.typed(*HF_DATASETS):
        packs = context.get(f"{key}.pack_to_max_length", True)
        if packs and not context.get(f"{key}.remove_unused_columns", False):
            yield Finding(
                f"{key}.remove_unused_columns",
                tr("packing joins rows, so their other columns cannot be kept"),
                "remove_unused_columns=True",
            )


@rule(
    "XT0302",
    WARNING,
    N_("batch_size above 1 with packed rows"),
    N_(
        "With use_varlen_attn the packed rows of a batch are joined into one row of "
        "batch_size x max_length tokens. The loss is right, but memory grows with it. Keep it "
        "if the memory suffices; otherwise accumulate."
    ),
    wrong="model = dict(type=SupervisedFinetune, use_varlen_attn=True)\n"
    "train_dataloader = dict(batch_size=4)",
    right="model = dict(type=SupervisedFinetune, use_varlen_attn=True)\n"
    "train_dataloader = dict(batch_size=1)\n"
    "optim_wrapper = dict(accumulative_counts=4)",
)
def varlen_joins_rows(context: Context) -> Iterator[Finding]:
    size = context.get("train_dataloader.batch_size")
    if context.get("model.use_varlen_attn") and is_number(size) and size > 1:
        if name_of(context.get("model.type")) != SFT:
            return
        yield Finding(
            "train_dataloader.batch_size",
            tr(
                "packed rows are joined into one of {size} x max_length tokens: "
                "batch_size is {size}",
                size=size,
            ),
            tr(
                "right, if the memory suffices; "
                "otherwise batch_size = 1 and more accumulative_counts"
            ),
        )


@rule(
    "XT0303",
    ERROR,
    N_("use_varlen_attn differs between model and data"),
    N_(
        "The model, the dataset and the collate function must agree on whether samples are "
        "packed with their lengths."
    ),
    wrong="model = dict(type=SupervisedFinetune, use_varlen_attn=True)\n"
    "train_dataset = dict(type=process_hf_dataset, use_varlen_attn=False)",
    right="model = dict(type=SupervisedFinetune, use_varlen_attn=True)\n"
    "train_dataset = dict(type=process_hf_dataset, use_varlen_attn=True)",
)
def varlen_disagrees(context: Context) -> Iterator[Finding]:
    model = bool(context.get("model.use_varlen_attn"))
    keys = ["train_dataloader.collate_fn", *context.typed(*HF_DATASETS, "build_preference_dataset")]
    for key in keys:
        value = context.get(f"{key}.use_varlen_attn")
        if isinstance(value, bool) and value != model and "val_" not in key and "test_" not in key:
            yield Finding(
                f"{key}.use_varlen_attn",
                tr(
                    "use_varlen_attn is {value} here and {model} in the model",
                    value=value,
                    model=model,
                ),
                tr("use one variable for both."),
            )
    for key in context.typed("VisionLanguageDataset"):
        if context.get(f"{key}.pack_to_max_length", True) and not model and "train_" in key:
            yield Finding(
                f"{key}.pack_to_max_length",
                tr("packed samples need use_varlen_attn=True in the model"),
                "pack_to_max_length=False",
            )


@rule(
    "XT0345",
    ERROR,
    N_("images for a model or a collate function of text"),
    N_(
        "Rows of VisionLanguageDataset need VisionLanguageFinetune and vision_language_collate_fn, "
        "which hand the images on; pairs of VisionLanguagePreferenceDataset need "
        "VisionLanguageDPO, VisionLanguageORPO or VisionLanguageRewardModel."
    ),
    wrong="model = dict(type=SupervisedFinetune)\n"
    "train_dataloader = dict(dataset=dict(type=VisionLanguageDataset))",
    right="model = dict(type=VisionLanguageFinetune)\n"
    "train_dataloader = dict(dataset=dict(type=VisionLanguageDataset), "
    "collate_fn=dict(type=vision_language_collate_fn, "
    "processor=dict(type=load_processor, name_or_path='Qwen/Qwen2.5-VL-3B-Instruct')))",
)
def images_for_text(context: Context) -> Iterator[Finding]:
    others = {*TEXT_PARTS, *(model for models in WITH_IMAGES.values() for model in models)}
    for dataset, models in WITH_IMAGES.items():
        if not any("train_" in key for key in context.typed(dataset)):
            continue
        wanted = {"model.type": models}
        if context.get("framework") != "huggingface":
            wanted["train_dataloader.collate_fn.type"] = ("vision_language_collate_fn",)
        for key, names in wanted.items():
            found = name_of(context.get(key)) or "None"
            if found in names or found not in others:
                continue
            name = tr(" or ").join(names)
            message = tr("data with images need {name} here, not {found}", name=name, found=found)
            yield Finding(key, message, names[0])


@rule(
    "XT0305",
    ERROR,
    N_("sequence_parallel_size does not divide the processes"),
    N_(
        "Each group of sequence_parallel_size processes shares a row, so the number of "
        "processes must be a multiple of it."
    ),
    wrong="sequence_parallel_size = 3  # 8 processes",
    right="sequence_parallel_size = 4  # 8 processes",
)
def sequence_parallel_divides_world(context: Context) -> Iterator[Finding]:
    size = context.get("sequence_parallel_size", 1)
    world = os.environ.get("WORLD_SIZE", "")
    if isinstance(size, int) and size > 1 and world.isdigit() and int(world) % size:
        yield Finding(
            "sequence_parallel_size",
            tr(
                "sequence_parallel_size {size} does not divide the {world} processes",
                size=size,
                world=world,
            ),
        )


@rule(
    "XT0307",
    WARNING,
    N_("the checkpoint interval is longer than the training"),
    N_("No checkpoint is written before the end: a run that is stopped early is lost."),
    wrong="train_cfg = dict(type=TrainLoop, max_iters=100)\n"
    "default_hooks = dict(checkpoint=dict(interval=500))",
    right="train_cfg = dict(type=TrainLoop, max_iters=100)\n"
    "default_hooks = dict(checkpoint=dict(interval=50))",
)
def saves_only_at_the_end(context: Context) -> Iterator[Finding]:
    steps = context.get("train_cfg.max_iters")
    interval = context.get("default_hooks.checkpoint.interval")
    if is_number(steps) and is_number(interval) and interval > steps:
        yield Finding(
            "default_hooks.checkpoint.interval",
            tr(
                "saves every {interval} batches, but training ends after {steps}",
                interval=interval,
                steps=steps,
            ),
        )


@rule(
    "XT0308",
    ERROR,
    N_("the warmup is longer than the training"),
    N_("The learning rate never reaches its full value."),
    wrong="param_scheduler = [dict(type=LinearLR, by_epoch=True, end=3)]\n"
    "train_cfg = dict(type=TrainLoop, max_epochs=1)",
    right="param_scheduler = [dict(type=LinearLR, by_epoch=True, end=0.03)]\n"
    "train_cfg = dict(type=TrainLoop, max_epochs=1)",
)
def warmup_outlasts_training(context: Context) -> Iterator[Finding]:
    for number, scheduler in enumerate(_schedulers(context)):
        by_epoch = dict.get(scheduler, "by_epoch", True)
        length = context.get("train_cfg.max_epochs" if by_epoch else "train_cfg.max_iters")
        end = dict.get(scheduler, "end")
        is_warmup = name_of(dict.get(scheduler, "type")) == "LinearLR"
        if is_warmup and is_number(end) and is_number(length) and end > length > 0:
            yield Finding(
                f"param_scheduler.{number}.end",
                tr(
                    "the warmup ends at {end:g}, training already at {length:g}",
                    end=end,
                    length=length,
                ),
                tr("warmup_ratio is a share, such as 0.03."),
            )


def _schedulers(context: Context) -> list[dict[str, Any]]:
    value = context.get("param_scheduler") or []
    return [s for s in (value if isinstance(value, list) else [value]) if isinstance(s, dict)]


@rule(
    "XT0309",
    WARNING,
    N_("the template of another model family"),
    N_(
        "A chat model has learnt the special tokens of its own template; another template "
        "makes it learn them anew. 'auto' takes the one of the tokenizer."
    ),
    wrong="model = dict(llm=dict(pretrained_model_name_or_path='Qwen/Qwen2.5-7B-Instruct'))\n"
    "fn = dict(type=template_map_fn_factory, template=PROMPT_TEMPLATE.vicuna)",
    right="model = dict(llm=dict(pretrained_model_name_or_path='Qwen/Qwen2.5-7B-Instruct'))\n"
    "fn = dict(type=template_map_fn_factory, template=PROMPT_TEMPLATE.qwen_chat)",
)
def template_of_another_family(context: Context) -> Iterator[Finding]:
    name = base_path(context).rstrip("/").lower()
    fits = next((names for pattern, names in CHAT_FAMILIES if re.search(pattern, name)), None)
    if fits is None:
        return
    for key in context.typed("template_map_fn_factory"):
        template = name_of(context.get(f"{key}.template")).rpartition(".")[2]
        if template in PROMPT_TEMPLATE and template not in fits | {"auto", "default", "moss_sft"}:
            yield Finding(
                f"{key}.template",
                tr(
                    "the model is a chat model of another family than template '{template}'",
                    template=template,
                ),
                f"PROMPT_TEMPLATE.{sorted(fits)[0]}",
            )


@rule(
    "XT0330",
    ERROR,
    N_("full training of a quantized model"),
    N_(
        "Weights in 4 or 8 bits have no gradient. Train adapters on them (QLoRA), or load the "
        "model unquantized."
    ),
    wrong="model = dict(type=SupervisedFinetune, "
    "llm=dict(quantization_config=dict(load_in_4bit=True)))",
    right="model = dict(type=SupervisedFinetune, "
    "llm=dict(quantization_config=dict(load_in_4bit=True)), lora=dict(r=64))",
)
def quantized_full_training(context: Context) -> Iterator[Finding]:
    llm = context.get("model.llm")
    if name_of(context.get("model.type")) != SFT or not isinstance(llm, dict):
        return
    quantization = dict.get(llm, "quantization_config")
    if quantization and not context.get("model.lora") and not context.get("model.peft_model"):
        yield Finding(
            "model.llm.quantization_config",
            tr("the weights of a quantized model cannot be trained in full"),
            tr("add lora=dict(...), or remove it."),
        )


@rule(
    "XT0331",
    WARNING,
    N_("a learning rate of another method"),
    N_(
        "LoRA usually takes 1e-4 to 3e-4, full training 1e-5 to 5e-5: the adapters start at "
        "0, the weights do not."
    ),
    wrong="model = dict(type=SupervisedFinetune, lora=dict(r=64))\n"
    "optim_wrapper = dict(optimizer=dict(lr=1e-6))",
    right="model = dict(type=SupervisedFinetune, lora=dict(r=64))\n"
    "optim_wrapper = dict(optimizer=dict(lr=2e-4))",
)
def learning_rate_of_lora(context: Context) -> Iterator[Finding]:
    lr = context.get("optim_wrapper.optimizer.lr")
    if name_of(context.get("model.type")) != SFT or not is_number(lr) or lr <= 0:
        return
    adapts = context.get("model.lora") or context.get("model.peft_model")
    quantized = context.get("model.llm.quantization_config")
    hub = base_path(context) and not looks_local(base_path(context)) and not quantized
    if not adapts and hub and lr >= LORA_LR:
        message = tr(
            "lr {lr:g} is typical of LoRA; full training usually takes 1e-5 to 5e-5", lr=lr
        )
        yield Finding("optim_wrapper.optimizer.lr", message, "lr = 2e-5")
    if adapts and lr <= FULL_LR:
        message = tr(
            "lr {lr:g} is typical of full training; LoRA usually takes 1e-4 to 3e-4", lr=lr
        )
        yield Finding("optim_wrapper.optimizer.lr", message, "lr = 2e-4")


@rule(
    "XT0332",
    WARNING,
    N_("braces in a system text"),
    N_("The system text of EvaluateChatHook is taken literally; nothing is filled into {}."),
    wrong="custom_hooks = [dict(type=EvaluateChatHook, system='You are {name}.')]",
    right="custom_hooks = [dict(type=EvaluateChatHook, system='You are Ada.')]",
)
def braces_in_system(context: Context) -> Iterator[Finding]:
    for key in context.typed("EvaluateChatHook"):
        system = context.get(f"{key}.system")
        if isinstance(system, str) and re.search(r"[{}]", system):
            yield Finding(
                f"{key}.system",
                tr("braces in a system text are taken literally; nothing is filled in"),
            )


@rule(
    "XT0333",
    ERROR,
    N_("a token that the tokenizer does not have"),
    N_("eos_token and pad_token must be in the vocabulary: a new one has no trained embedding."),
    wrong="tokenizer = dict(pretrained_model_name_or_path='./model', eos_token='<|endd|>')",
    right="tokenizer = dict(pretrained_model_name_or_path='./model')",
)
def eos_not_in_tokenizer(context: Context) -> Iterator[Finding]:
    folder = context.get("tokenizer.pretrained_model_name_or_path")
    content = local_json(folder, "tokenizer.json") if isinstance(folder, str) else {}
    if not content:
        return
    model = content.get("model", {})
    vocabulary = model.get("vocab", {})
    known = set(vocabulary) if isinstance(vocabulary, dict) else {row[0] for row in vocabulary}
    known |= {token.get("content") for token in content.get("added_tokens", [])}
    for name in ("eos_token", "pad_token"):
        token = context.get(f"tokenizer.{name}")
        if isinstance(token, str) and token not in known:
            yield Finding(
                f"tokenizer.{name}",
                tr(
                    "the tokenizer in '{folder}' has no token {token!r}", folder=folder, token=token
                ),
                tr("remove it, or take one that it has."),
            )


@rule(
    "XT0334",
    WARNING,
    N_("pad_token equals eos_token"),
    N_(
        "Where padding is masked by its id, the end of each answer is masked with it, and the "
        "model does not learn to stop."
    ),
    wrong="tokenizer = dict(pad_token='</s>', eos_token='</s>')",
    right="tokenizer = dict(pad_token='<unk>', eos_token='</s>')",
)
def pad_is_eos(context: Context) -> Iterator[Finding]:
    pad, eos = context.get("tokenizer.pad_token"), context.get("tokenizer.eos_token")
    if isinstance(pad, str) and pad == eos:
        yield Finding(
            "tokenizer.pad_token",
            tr(
                "pad_token equals eos_token: where padding is masked by its id, the end of an "
                "answer is never learnt"
            ),
        )


@rule(
    "XT0335",
    WARNING,
    N_("the tokenizer of another model"),
    N_(
        "The ids of another tokenizer mean other tokens to the model. Where two names mean "
        "the same tokenizer, use one."
    ),
    wrong="tokenizer = dict(pretrained_model_name_or_path='Qwen/Qwen2.5-7B')\n"
    "model = dict(llm=dict(pretrained_model_name_or_path='Qwen/Qwen3-8B'))",
    right="path = 'Qwen/Qwen3-8B'\n"
    "tokenizer = dict(pretrained_model_name_or_path=path)\n"
    "model = dict(llm=dict(pretrained_model_name_or_path=path))",
)
def tokenizer_of_another_model(context: Context) -> Iterator[Finding]:
    key = "tokenizer.pretrained_model_name_or_path"
    tokenizer, model = context.get(key), context.get("model.llm.pretrained_model_name_or_path")
    if isinstance(tokenizer, str) and isinstance(model, str) and tokenizer != model:
        yield Finding(
            key,
            tr(
                "the tokenizer is of '{tokenizer}', the model is '{model}'",
                tokenizer=tokenizer,
                model=model,
            ),
            tr("use one variable for both."),
        )


@rule(
    "XT0336",
    WARNING,
    N_("rows are grouped by another batch size"),
    N_(
        "LengthGroupedSampler puts rows of similar length into one optimizer step, so it "
        "needs batch_size x accumulative_counts."
    ),
    wrong="from xtuner.dataset.samplers import LengthGroupedSampler\n"
    "train_dataloader = dict(batch_size=2, sampler=dict(type=LengthGroupedSampler, "
    "per_device_batch_size=2))\n"
    "optim_wrapper = dict(accumulative_counts=8)",
    right="from xtuner.dataset.samplers import LengthGroupedSampler\n"
    "train_dataloader = dict(batch_size=2, sampler=dict(type=LengthGroupedSampler, "
    "per_device_batch_size=16))\n"
    "optim_wrapper = dict(accumulative_counts=8)",
)
def groups_of_another_batch_size(context: Context) -> Iterator[Finding]:
    if context.kind("train_dataloader.sampler") != "LengthGroupedSampler":
        return
    key = "train_dataloader.sampler.per_device_batch_size"
    size = context.get("train_dataloader.batch_size")
    counts = context.get("optim_wrapper.accumulative_counts", 1)
    grouped = context.get(key)
    if is_number(size) and is_number(counts) and is_number(grouped) and grouped != size * counts:
        yield Finding(
            key,
            tr(
                "rows are grouped by {grouped}, a step takes {batch_size}",
                grouped=grouped,
                batch_size=size * counts,
            ),
            "per_device_batch_size=batch_size * accumulative_counts",
        )


@rule(
    "XT0337",
    ERROR,
    N_("an unknown loss_scale"),
    N_("loss_scale is a number or 'dynamic'."),
    wrong="optim_wrapper = dict(loss_scale='dynamik', dtype='float16')",
    right="optim_wrapper = dict(loss_scale='dynamic', dtype='float16')",
)
def unknown_loss_scale(context: Context) -> Iterator[Finding]:
    scale, dtype = context.get("optim_wrapper.loss_scale"), context.get("optim_wrapper.dtype")
    if isinstance(scale, str) and scale != "dynamic":
        yield Finding(
            "optim_wrapper.loss_scale",
            tr("loss_scale {scale!r} is unknown (dtype {dtype!r})", scale=scale, dtype=dtype),
            'loss_scale="dynamic"',
        )


@rule(
    "XT0338",
    WARNING,
    N_("conversations without a template"),
    N_(
        "The template puts the marks of each turn around questions and answers; without it "
        "they are joined as one text."
    ),
    wrong="train_dataset = dict(type=process_hf_dataset, dataset_map_fn=alpaca_map_fn, "
    "template_map_fn=None)",
    right="train_dataset = dict(type=process_hf_dataset, dataset_map_fn=alpaca_map_fn, "
    "template_map_fn=dict(type=template_map_fn_factory, "
    "template=PROMPT_TEMPLATE.qwen_chat))",
)
def template_missing(context: Context) -> Iterator[Finding]:
    """Turns without a template run into each other."""
    for key in context.typed(*HF_DATASETS):
        rows = name_of(context.get(f"{key}.dataset_map_fn"))
        if (
            rows not in ("", "pretrain_map_fn", "default_map_fn")
            and context.get(f"{key}.template_map_fn") is None
        ):
            if context.get(f"{key}.do_dataset_tokenization") is False:
                continue
            yield Finding(
                f"{key}.template_map_fn",
                tr("without a template_map_fn, questions and answers are joined bare"),
                "template_map_fn=dict(type=template_map_fn_factory, template=prompt_template)",
            )
