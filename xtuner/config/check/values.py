"""XT031x-XT033x: single values that cannot be right, whatever else the config says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

from xtuner.config.check.problem import ERROR, WARNING, Context, Finding, rule
from xtuner.config.values import is_number, name_of
from xtuner.utils.dtypes import DTYPE_NAMES
from xtuner.utils.lang import tr

POSITIVE = (
    "train_dataloader.batch_size",
    "val_dataloader.batch_size",
    "optim_wrapper.optimizer.lr",
    "optim_wrapper.accumulative_counts",
    "optim_wrapper.clip_grad.max_norm",
    "train_cfg.max_epochs",
    "train_cfg.max_iters",
    "default_hooks.logger.interval",
    "sequence_parallel_size",
    "max_length",
    "model.lora.r",
    "model.lora.lora_alpha",
)
SHARES = ("model.lora.lora_dropout", "model.label_smoothing")


@rule("XT0310", ERROR)
def not_positive(context: Context) -> Iterator[Finding]:
    for key in POSITIVE:
        value = context.get(key)
        if value is not None and (not is_number(value) or value <= 0):
            yield Finding(
                key,
                tr("expected a number above 0, got {value!r}", value=value),
            )


@rule("XT0311", ERROR)
def not_a_share(context: Context) -> Iterator[Finding]:
    for key in SHARES:
        value = context.get(key)
        if value is not None and (not is_number(value) or not 0 <= value < 1):
            yield Finding(
                key,
                tr("expected a number from 0 up to 1, got {value!r}", value=value),
            )


@rule("XT0312", ERROR)
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


@rule("XT0313", ERROR)
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


@rule("XT0314", ERROR)
def negative_weight_decay(context: Context) -> Iterator[Finding]:
    key = "optim_wrapper.optimizer.weight_decay"
    value = context.get(key)
    if value is not None and (not is_number(value) or value < 0):
        yield Finding(
            key,
            tr("expected 0 or more, got {value!r}", value=value),
        )


@rule("XT0315", ERROR)
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


@rule("XT0316", ERROR)
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


@rule("XT0317", WARNING)
def no_such_data_file(context: Context) -> Iterator[Finding]:
    for key in context.typed("load_dataset"):
        files = context.get(f"{key}.data_files")
        named = dict.values(files) if isinstance(files, dict) else [files]
        flat = [p for item in named for p in (item if isinstance(item, list | tuple) else [item])]
        for path in flat:
            absent = looks_local(path) and not Path(path).expanduser().exists()
            if absent and not any(sign in path for sign in "*?["):
                yield Finding(
                    f"{key}.data_files",
                    tr("there is no file '{path}'", path=path),
                )


def _absent(context: Context, key: str) -> Iterator[Finding]:
    path = context.get(key)
    if looks_local(path) and not Path(str(path)).expanduser().exists():
        yield Finding(key, tr("there is no checkpoint '{path}'", path=path))


@rule("XT0318", ERROR)
def no_such_checkpoint(context: Context) -> Iterator[Finding]:
    yield from _absent(context, "load_from")


@rule("XT0328", WARNING)
def no_such_pretrained_part(context: Context) -> Iterator[Finding]:
    """A warning: it is usually what another run is going to write."""
    yield from _absent(context, "model.pretrained_pth")


@rule("XT0329", ERROR)
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


@rule("XT0319", ERROR)
def both_lengths_of_training(context: Context) -> Iterator[Finding]:
    if context.get("train_cfg.max_epochs") and context.get("train_cfg.max_iters"):
        yield Finding(
            "train_cfg.max_iters",
            tr("max_epochs and max_iters are both set; one of them says how long to train"),
            tr("remove one of them."),
        )


@rule("XT0320", ERROR)
def no_length_of_training(context: Context) -> Iterator[Finding]:
    lengths = (context.get("train_cfg.max_epochs"), context.get("train_cfg.max_iters"))
    if isinstance(context.get("train_cfg"), dict) and lengths == (None, None):
        yield Finding(
            "train_cfg",
            tr("train_cfg does not say how long to train"),
            "train_cfg = dict(type=TrainLoop, max_epochs=max_epochs)",
        )


@rule("XT0321", ERROR)
def two_quantizations(context: Context) -> Iterator[Finding]:
    for key in context.typed("BitsAndBytesConfig"):
        if context.get(f"{key}.load_in_4bit") and context.get(f"{key}.load_in_8bit"):
            yield Finding(
                f"{key}.load_in_8bit",
                tr("load_in_4bit and load_in_8bit are both on"),
                tr("turn one of them off."),
            )


@rule("XT0322", ERROR)
def bad_evaluation_interval(context: Context) -> Iterator[Finding]:
    for key in context.typed("EvaluateChatHook"):
        every = context.get(f"{key}.every_n_iters")
        if every is not None and (not is_number(every) or every < 0):
            yield Finding(
                f"{key}.every_n_iters",
                tr("expected a number above 0, or 0 for never, got {every!r}", every=every),
            )


@rule("XT0323", ERROR)
def evaluation_inputs_not_a_list(context: Context) -> Iterator[Finding]:
    for key in context.typed("EvaluateChatHook"):
        inputs = context.get(f"{key}.evaluation_inputs")
        if isinstance(inputs, str):
            yield Finding(
                f"{key}.evaluation_inputs",
                tr("expected a list of questions, got one text"),
                tr("put it into brackets: [...]"),
            )


@rule("XT0324", ERROR)
def unknown_map_function(context: Context) -> Iterator[Finding]:
    """A row map function may be given by its key; the keys are those of list-dataset-format."""
    for key in context.typed("process_hf_dataset", "process_ms_dataset"):
        value = context.get(f"{key}.dataset_map_fn")
        if is_number(value) or isinstance(value, bool | list):
            yield Finding(
                f"{key}.dataset_map_fn",
                tr("expected a function, got {value!r}", value=value),
                tr("'xtuner list-dataset-format' lists them."),
            )


@rule("XT0325", ERROR)
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


@rule("XT0326", ERROR)
def text_for_a_number(context: Context) -> Iterator[Finding]:
    """A number in quotes reaches torch as text."""
    for key in context.typed("process_hf_dataset", "LLaVADataset", "build_preference_dataset"):
        length = context.get(f"{key}.max_length")
        if length is not None and (not isinstance(length, int) or length <= 0):
            yield Finding(
                f"{key}.max_length",
                tr("expected a whole number above 0, got {length!r}", length=length),
            )


@rule("XT0327", ERROR)
def unknown_loss_type(context: Context) -> Iterator[Finding]:
    known = {
        "DPO": ["sigmoid", "robust", "hinge", "ipo", "kto_pair", "sppo_hard", "nca_pair"],
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


@rule("XT0339", ERROR)
def unknown_compile(context: Context) -> Iterator[Finding]:
    value = context.get("model.compile")
    if value is not None and not isinstance(value, bool) and value != "auto":
        yield Finding(
            "model.compile",
            tr("expected True, False or 'auto', got {value!r}", value=value),
        )
