"""XT031x-XT033x: single values that cannot be right, whatever else the config says."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

from xtuner.config.check.code import ERROR, WARNING
from xtuner.config.check.problem import Context, Finding, rule
from xtuner.config.values import is_number, name_of
from xtuner.utils.dataset_settings import CHOICES
from xtuner.utils.dtypes import DTYPE_NAMES
from xtuner.utils.lang import N_, tr

POSITIVE = (
    "train_cfg.max_epochs",
    "optim_wrapper.optimizer.lr",
    "optim_wrapper.clip_grad.max_norm",
    "model.lora.lora_alpha",
)
WHOLE = (
    "train_dataloader.batch_size",
    "val_dataloader.batch_size",
    "optim_wrapper.accumulative_counts",
    "train_cfg.max_iters",
    "default_hooks.logger.interval",
    "sequence_parallel_size",
    "max_length",
    "model.lora.r",
)
SHARES = ("model.lora.lora_dropout", "model.label_smoothing")


@rule(
    "XT0310",
    ERROR,
    N_("a number that must be above 0"),
    N_(
        "Sizes, lengths, rates and intervals must be numbers above 0; a text such as '1e-4' "
        "is not a number."
    ),
    wrong="train_dataloader = dict(batch_size=0)",
    right="train_dataloader = dict(batch_size=1)",
)
def not_positive(context: Context) -> Iterator[Finding]:
    for key in (*POSITIVE, *WHOLE):
        value = context.get(key)
        if value is None or (is_number(value) and value > 0 and math.isfinite(value)):
            is_wrong = key in WHOLE and isinstance(value, float)
            text = tr("expected a whole number above 0, got {value!r}", value=value)
        else:
            is_wrong = True
            text = tr("expected a number above 0, got {value!r}", value=value)
        if is_wrong:
            yield Finding(key, text, _number_hint(value))


def _number_hint(value: object) -> str | None:
    """How a value became another than the number that was meant."""
    if isinstance(value, tuple) and len(value) == 1:
        return tr("a comma at the end of the line makes a tuple: delete it.")
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            if float(value) > 0:
                return tr("write it without quotes.")
    return None


@rule(
    "XT0311",
    ERROR,
    N_("a share outside 0 to 1"),
    N_("Dropout and label smoothing are shares: 5 percent is 0.05."),
    wrong="model = dict(lora=dict(lora_dropout=5))",
    right="model = dict(lora=dict(lora_dropout=0.05))",
)
def not_a_share(context: Context) -> Iterator[Finding]:
    for key in SHARES:
        value = context.get(key)
        if value is not None and (not is_number(value) or not 0 <= value < 1):
            yield Finding(
                key,
                tr("expected a number from 0 up to 1, got {value!r}", value=value),
            )


@rule(
    "XT0312",
    ERROR,
    N_("wrong betas of the optimizer"),
    N_("Adam takes two betas from 0 up to 1."),
    wrong="optim_wrapper = dict(optimizer=dict(betas=0.9))",
    right="optim_wrapper = dict(optimizer=dict(betas=(0.9, 0.999)))",
)
def wrong_betas(context: Context) -> Iterator[Finding]:
    key = "optim_wrapper.optimizer.betas"
    betas = context.get(key)
    if betas is None:
        return
    pair = isinstance(betas, list | tuple) and len(betas) == 2
    if not pair or not all(is_number(beta) and 0 <= beta < 1 for beta in betas):
        yield Finding(
            key,
            tr("expected two numbers from 0 up to 1, got {betas!r}", betas=betas),
            "betas = (0.9, 0.999)",
        )


@rule(
    "XT0313",
    ERROR,
    N_("an unknown dtype"),
    N_(
        "A dtype is given by its name in torch, such as bfloat16, float16 or float32, or as 'auto'."
    ),
    wrong="model = dict(llm=dict(dtype='bfloat'))",
    right="model = dict(llm=dict(dtype='bfloat16'))",
)
def unknown_dtype(context: Context) -> Iterator[Finding]:
    keys = ["optim_wrapper.dtype", "model.llm.dtype", "model.llm.torch_dtype"]
    keys.append("model.llm.quantization_config.bnb_4bit_compute_dtype")
    for key in keys:
        value = context.get(key)
        if isinstance(value, str) and value not in (*DTYPE_NAMES, "auto"):
            yield Finding(
                key,
                tr("there is no dtype {value!r}", value=value),
                tr("there are: {dtypes}", dtypes=", ".join(DTYPE_NAMES)),
            )


@rule(
    "XT0314",
    ERROR,
    N_("a negative weight decay"),
    N_("Weight decay pulls weights towards 0; a negative one makes them grow."),
    wrong="optim_wrapper = dict(optimizer=dict(weight_decay=-0.1))",
    right="optim_wrapper = dict(optimizer=dict(weight_decay=0.1))",
)
def negative_weight_decay(context: Context) -> Iterator[Finding]:
    key = "optim_wrapper.optimizer.weight_decay"
    value = context.get(key)
    if value is not None and (not is_number(value) or value < 0):
        yield Finding(
            key,
            tr("expected 0 or more, got {value!r}", value=value),
        )


@rule(
    "XT0315",
    ERROR,
    N_("the work dir cannot be written to"),
    N_(
        "Checkpoints and logs go into the work dir: it must be a folder, or a new one in a "
        "folder that you may write to."
    ),
    wrong="work_dir = '/dev/null/run'",
    right="work_dir = './work_dirs/run'",
)
def work_dir_not_writable(context: Context) -> Iterator[Finding]:
    work_dir = context.get("work_dir")
    if not isinstance(work_dir, str):
        return
    place = Path(work_dir).expanduser().absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        yield Finding(
            "work_dir",
            tr("'{work_dir}' cannot be written to", work_dir=work_dir),
            tr("choose another folder, or --work-dir"),
        )


def looks_local(path: object) -> TypeGuard[str]:
    """Whether a model or data path can only be a local one."""
    return isinstance(path, str) and path.startswith(("/", "./", "../", "~"))


def _made_before(context: Context) -> set[str]:
    """Folders that ``before_run`` makes."""
    steps = context.get("before_run") or []
    return {str(dict.get(step, "save_dir")) for step in steps if isinstance(step, dict)}


@rule(
    "XT0316",
    ERROR,
    N_("a model folder that does not exist"),
    N_(
        "A path that begins with '/', './', '../' or '~' is a local folder; a name such as "
        "'Qwen/Qwen2.5-7B' is looked up on the hub."
    ),
    wrong="tokenizer = dict(pretrained_model_name_or_path='./no_such_model')",
    right="tokenizer = dict(pretrained_model_name_or_path='Qwen/Qwen2.5-7B')",
)
def no_such_model_folder(context: Context) -> Iterator[Finding]:
    made = _made_before(context)
    for key, value in context.dicts():
        path = dict.get(value, "pretrained_model_name_or_path")
        if not looks_local(path) or path in made:
            continue
        if not Path(str(path)).expanduser().exists():
            yield Finding(
                f"{key}.pretrained_model_name_or_path",
                tr("there is no folder '{path}'", path=path),
                tr("a local path must exist; a name on the hub looks like 'Qwen/Qwen2.5-7B'."),
            )


def _absent(context: Context, key: str) -> Iterator[Finding]:
    path = context.get(key)
    if looks_local(path) and not Path(str(path)).expanduser().exists():
        yield Finding(key, tr("there is no checkpoint '{path}'", path=path))


@rule(
    "XT0318",
    ERROR,
    N_("a checkpoint that does not exist"),
    N_(
        "load_from starts the training from the weights of a checkpoint; without it the run "
        "cannot begin."
    ),
    wrong="load_from = './no_such.pth'",
    right="load_from = None",
)
def no_such_checkpoint(context: Context) -> Iterator[Finding]:
    yield from _absent(context, "load_from")


@rule(
    "XT0328",
    WARNING,
    N_("pretrained weights that are not there yet"),
    N_(
        "model.pretrained_pth is usually written by an earlier run, such as the pretraining "
        "of LLaVA's projector. Start that run first."
    ),
    wrong="model = dict(pretrained_pth='./work_dirs/pretrain/iter_1.pth')",
    right="model = dict(pretrained_pth=None)",
)
def no_such_pretrained_part(context: Context) -> Iterator[Finding]:
    """A warning: it is usually what another run is going to write."""
    yield from _absent(context, "model.pretrained_pth")


@rule(
    "XT0329",
    ERROR,
    N_("an invalid checkpoint interval"),
    N_("The interval is a number of batches (or epochs, with by_epoch); -1 means never."),
    wrong="default_hooks = dict(checkpoint=dict(interval=0))",
    right="default_hooks = dict(checkpoint=dict(interval=500))",
)
def saves_every_zero_batches(context: Context) -> Iterator[Finding]:
    key = "default_hooks.checkpoint.interval"
    interval = context.get(key)
    if interval is not None and (not is_number(interval) or interval == 0):
        yield Finding(
            key,
            tr(
                "expected a number of batches, or -1 for never, got {interval!r}", interval=interval
            ),
        )


@rule(
    "XT0319",
    ERROR,
    N_("two lengths of the training"),
    N_("max_epochs and max_iters contradict each other."),
    wrong="train_cfg = dict(type=TrainLoop, max_epochs=3, max_iters=1000)",
    right="train_cfg = dict(type=TrainLoop, max_epochs=3)",
)
def both_lengths_of_training(context: Context) -> Iterator[Finding]:
    if context.get("train_cfg.max_epochs") and context.get("train_cfg.max_iters"):
        yield Finding(
            "train_cfg.max_iters",
            tr("max_epochs and max_iters are both set; one of them says how long to train"),
            tr("remove one of them."),
        )


@rule(
    "XT0320",
    ERROR,
    N_("no length of the training"),
    N_("train_cfg needs max_epochs or max_iters."),
    wrong="train_cfg = dict(type=TrainLoop)",
    right="train_cfg = dict(type=TrainLoop, max_epochs=3)",
)
def no_length_of_training(context: Context) -> Iterator[Finding]:
    lengths = (context.get("train_cfg.max_epochs"), context.get("train_cfg.max_iters"))
    if isinstance(context.get("train_cfg"), dict) and lengths == (None, None):
        yield Finding(
            "train_cfg",
            tr("train_cfg does not say how long to train"),
            "train_cfg = dict(type=TrainLoop, max_epochs=max_epochs)",
        )


@rule(
    "XT0321",
    ERROR,
    N_("4 bits and 8 bits at once"),
    N_("bitsandbytes quantizes weights to 4 or to 8 bits. QLoRA takes 4."),
    wrong="quantization = dict(type=BitsAndBytesConfig, load_in_4bit=True, "
    "load_in_8bit=True)\n"
    "model = dict(llm=dict(quantization_config=quantization))",
    right="quantization = dict(type=BitsAndBytesConfig, load_in_4bit=True)\n"
    "model = dict(llm=dict(quantization_config=quantization))",
)
def two_quantizations(context: Context) -> Iterator[Finding]:
    for key in context.typed("BitsAndBytesConfig"):
        if context.get(f"{key}.load_in_4bit") and context.get(f"{key}.load_in_8bit"):
            yield Finding(
                f"{key}.load_in_8bit",
                tr("load_in_4bit and load_in_8bit are both on"),
                tr("turn one of them off."),
            )


@rule(
    "XT0322",
    ERROR,
    N_("an invalid interval of sample outputs"),
    N_("every_n_iters is a number of batches; 0 switches the sample outputs off."),
    wrong="custom_hooks = [dict(type=EvaluateChatHook, every_n_iters=-1)]",
    right="custom_hooks = [dict(type=EvaluateChatHook, every_n_iters=500)]",
)
def bad_evaluation_interval(context: Context) -> Iterator[Finding]:
    for key in context.typed("EvaluateChatHook"):
        every = context.get(f"{key}.every_n_iters")
        if every is not None and (not is_number(every) or every < 0):
            yield Finding(
                f"{key}.every_n_iters",
                tr("expected a number above 0, or 0 for never, got {every!r}", every=every),
            )


@rule(
    "XT0323",
    ERROR,
    N_("evaluation_inputs is one text"),
    N_("It is a list of questions; one text would be read as a list of its characters."),
    wrong="custom_hooks = [dict(type=EvaluateChatHook, evaluation_inputs='Who are you?')]",
    right="custom_hooks = [dict(type=EvaluateChatHook, evaluation_inputs=['Who are you?'])]",
)
def evaluation_inputs_not_a_list(context: Context) -> Iterator[Finding]:
    for key in context.typed("EvaluateChatHook"):
        inputs = context.get(f"{key}.evaluation_inputs")
        if isinstance(inputs, str):
            yield Finding(
                f"{key}.evaluation_inputs",
                tr("expected a list of questions, got one text"),
                tr("put it into brackets: [...]"),
            )


@rule(
    "XT0325",
    ERROR,
    N_("a switch in quotes"),
    N_("Any text that is not empty counts as true, 'False' too."),
    wrong="model = dict(use_varlen_attn='False')",
    right="model = dict(use_varlen_attn=False)",
)
def text_for_a_switch(context: Context) -> Iterator[Finding]:
    """The text ``"False"`` counts as true."""
    for key, value in context.dicts():
        for name in dict.keys(value):
            inner = dict.__getitem__(value, name)
            if isinstance(inner, str) and inner.lower() in ("true", "false"):
                yield Finding(
                    f"{key}.{name}",
                    tr("{inner!r} is text, not a switch", inner=inner),
                    tr("write it without quotes."),
                )


@rule(
    "XT0326",
    ERROR,
    N_("max_length is not a whole number above 0"),
    N_("It is the length of a sample in tokens. A number in quotes is text."),
    wrong="train_dataset = dict(type=process_hf_dataset, max_length='2048')",
    right="train_dataset = dict(type=process_hf_dataset, max_length=2048)",
)
def text_for_a_number(context: Context) -> Iterator[Finding]:
    """A number in quotes reaches torch as text."""
    for key in context.typed(*CHOICES):
        length = context.get(f"{key}.max_length")
        is_whole = isinstance(length, int) and not isinstance(length, bool)
        if length is not None and not (is_whole and length > 0):
            yield Finding(
                f"{key}.max_length",
                tr("expected a whole number above 0, got {length!r}", length=length),
            )


@rule(
    "XT0327",
    ERROR,
    N_("an unknown loss"),
    N_("DPO and RewardModel have fixed names for their losses."),
    wrong="model = dict(type=DPO, loss_type='sigmoyd')",
    right="model = dict(type=DPO, loss_type='sigmoid')",
)
def unknown_loss_type(context: Context) -> Iterator[Finding]:
    dpo = ["sigmoid", "robust", "hinge", "ipo", "kto_pair", "sppo_hard", "nca_pair"]
    known = {
        "DPO": dpo,
        "VisionLanguageDPO": dpo,
        "RewardModel": ["ranking", "focal"],
    }
    kind = name_of(context.get("model.type"))
    value = context.get("model.loss_type")
    if value is not None and value not in known.get(kind, [value]):
        yield Finding(
            "model.loss_type",
            tr("{kind} has no loss {value!r}", kind=kind, value=value),
            tr("there are: {known}", known=", ".join(known[kind])),
        )


@rule(
    "XT0339",
    ERROR,
    N_("an invalid value of compile"),
    N_("compile is True, False or 'auto' (where the run is long enough to gain from it)."),
    wrong="model = dict(compile='yes')",
    right="model = dict(compile='auto')",
)
def unknown_compile(context: Context) -> Iterator[Finding]:
    value = context.get("model.compile")
    if value is not None and not isinstance(value, bool) and value != "auto":
        yield Finding(
            "model.compile",
            tr("expected True, False or 'auto', got {value!r}", value=value),
        )


@rule(
    "XT0350",
    ERROR,
    N_("an invalid value of use_activation_checkpointing"),
    N_(
        "use_activation_checkpointing is True, False, or a dict of every_n_layers (2 recomputes "
        "every second layer) and offload (keep what layers are recomputed from in main memory)."
    ),
    wrong="model = dict(use_activation_checkpointing=dict(every=2))",
    right="model = dict(use_activation_checkpointing=dict(every_n_layers=2))",
)
def unknown_checkpointing(context: Context) -> Iterator[Finding]:
    key = "model.use_activation_checkpointing"
    value = context.get(key, True)
    if isinstance(value, bool):
        return
    count = context.get(f"{key}.every_n_layers", 1)
    is_known = isinstance(value, dict) and {"every_n_layers", "offload"} >= {*value}
    is_whole = isinstance(count, int) and not isinstance(count, bool) and count > 0
    if not (is_known and is_whole and isinstance(context.get(f"{key}.offload", False), bool)):
        yield Finding(
            key,
            tr("expected True, False or a dict, got {value!r}", value=value),
            tr("write True, False, or dict(every_n_layers=2, offload=True), either or both."),
        )
