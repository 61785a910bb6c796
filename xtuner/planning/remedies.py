"""What to change where a run does not fit: the cheapest first, each with its new sum."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from xtuner.config.document import ConfigDocument
from xtuner.config.override import override
from xtuner.config.values import own_values
from xtuner.planning.plan import Machine, Plan, Planner
from xtuner.planning.settings import LENGTHS
from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr

MIN_LENGTH = 512
USUAL_RANK = 16
"""Rank of an adapter that published comparisons find enough for most data."""
MOST_GPUS = 64
LEAST_GAIN = 0.98
"""A change must leave less than this share of the memory."""
BITS_4 = (
    "model.llm.quantization_config=dict(type='transformers.BitsAndBytesConfig',load_in_4bit=True,"
    "bnb_4bit_compute_dtype='bfloat16',bnb_4bit_quant_type='nf4',bnb_4bit_use_double_quant=True)"
)
LORA = (
    "model.lora=dict(type='peft.LoraConfig',r=16,lora_alpha=32,lora_dropout=0.0,bias='none',"
    "task_type='CAUSAL_LM')"
)
ADAMW_8BIT = "bitsandbytes.optim.AdamW8bit"
SETTINGS = {
    "batch_size": "train_dataloader.batch_size",
    "accumulative_counts": "optim_wrapper.accumulative_counts",
    "optim_type": "optim_wrapper.optimizer.type",
}
"""Settings at the top of rendered configs, and the keys that they are for."""


@dataclass(frozen=True)
class Change:
    """One change of a run.

    Attributes:
        what: a sentence.
        options: words of ``--cfg-options``.
        machine: the machine after it.
        words: words of ``xtuner train`` (``--fsdp``), beside the options.
    """

    what: str
    options: tuple[str, ...]
    machine: Machine
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Remedy:
    """A change and the plan with it and with those before it."""

    change: Change
    plan: Plan


def remedies(planner: Planner, document: ConfigDocument, plan: Plan) -> list[Remedy]:
    """The changes, one on top of the other, with which a run fits.

    A change that saves nothing is left out.

    Args:
        planner: made ``plan``.
        document: the config that was planned.
        plan: one that does not fit.

    Returns:
        In order; the last plan fits, unless nothing does.
    """
    found: list[Remedy] = []
    for step in STEPS:
        while not plan.fits:
            change = step(document, plan)
            if change is None:
                break
            try:
                changed = override(document, change.options)
                better = planner.plan(changed, change.machine)
            except UserError:  # the config builds that part in a way of its own
                break
            if better.memory.total > LEAST_GAIN * plan.memory.total:
                break
            document, plan = changed, better
            found.append(Remedy(change, plan))
    return found


def _checkpointing(document: ConfigDocument, plan: Plan) -> Change | None:
    if plan.settings.checkpointing:
        return None
    return Change(
        tr("recompute activations in the backward pass (a third more time)"),
        ("model.use_activation_checkpointing=True",),
        plan.machine,
    )


def _batch(document: ConfigDocument, plan: Plan) -> Change | None:
    """Half the micro-batch and twice the accumulation: the same step."""
    size = plan.settings.batch_size
    if size == 1:
        return None
    smaller = next(n for n in range(size // 2, 0, -1) if size % n == 0)
    counts = plan.settings.accumulative_counts * size // smaller
    return Change(
        tr("smaller micro-batches, more of them in a step: the same training"),
        (
            _option(document, "batch_size", smaller),
            _option(document, "accumulative_counts", counts),
        ),
        plan.machine,
    )


def _optimizer(document: ConfigDocument, plan: Plan) -> Change | None:
    sharded = plan.settings.sharding.name == "fsdp"  # bitsandbytes does not work there
    if plan.settings.optimizer not in ("Adam", "AdamW") or sharded:
        return None
    if plan.memory.optimizer < plan.memory.total / 20:
        return None
    return Change(
        tr("an optimizer whose state has 8 bits (bitsandbytes)"),
        (_option(document, "optim_type", ADAMW_8BIT),),
        plan.machine,
    )


def _sharding(document: ConfigDocument, plan: Plan) -> Change | None:
    sharding = plan.settings.sharding
    if sharding.ranks == 1 or sharding.name in ("fsdp", "zero3"):
        return None
    options: tuple[str, ...] = ()
    if plan.settings.optimizer.endswith("bit"):
        options = (_option(document, "optim_type", "torch.optim.AdamW"),)
    machine = replace(plan.machine, deepspeed=None, fsdp=True)
    return Change(tr("shard the model over the GPUs"), options, machine, ("--fsdp",))


def _offload(document: ConfigDocument, plan: Plan) -> Change | None:
    if plan.settings.sharding.name != "fsdp" or plan.machine.offload:
        return None
    machine = replace(plan.machine, offload=True)
    return Change(tr("keep the shards in main memory (slower)"), (), machine, ("--fsdp-offload",))


def _option(document: ConfigDocument, setting: str, value: object) -> str:
    """A word of ``--cfg-options``; for the setting at the top of the config where it has one."""
    key = setting if setting in own_values(document.config) else SETTINGS[setting]
    return f"{key}={value}"


def _model(document: ConfigDocument) -> dict[str, Any]:
    model = dict.get(own_values(document.config), "model")
    return model if isinstance(model, dict) else {}


def _quantize(document: ConfigDocument, plan: Plan) -> Change | None:
    model = _model(document)
    llm = dict.get(model, "llm")
    if dict.get(model, "lora") is None or not isinstance(llm, dict):
        return None
    if dict.get(llm, "quantization_config") is not None:
        return None
    return Change(tr("keep the frozen weights in 4 bits (QLoRA)"), (BITS_4,), plan.machine)


def _adapter(document: ConfigDocument, plan: Plan) -> Change | None:
    model = _model(document)
    if dict.get(model, "lora") is not None or dict.get(model, "peft_model") is not None:
        return None
    if not isinstance(dict.get(model, "llm"), dict):
        return None
    return Change(tr("train an adapter in place of all weights (LoRA)"), (LORA,), plan.machine)


def _rank(document: ConfigDocument, plan: Plan) -> Change | None:
    lora = dict.get(_model(document), "lora")
    if not isinstance(lora, dict):
        return None
    rank = dict.get(lora, "r")
    if not isinstance(rank, int) or rank <= USUAL_RANK:
        return None
    alpha = dict.get(lora, "lora_alpha")
    options = [f"model.lora.r={USUAL_RANK}"]
    if isinstance(alpha, int | float):  # the adapter's scale, alpha / r, stays
        options.append(f"model.lora.lora_alpha={alpha * USUAL_RANK / rank:g}")
    return Change(
        tr("an adapter of rank {rank} in place of {old}", rank=USUAL_RANK, old=rank),
        tuple(options),
        plan.machine,
    )


def _shorter(document: ConfigDocument, plan: Plan) -> Change | None:
    length = plan.settings.length // 2
    if length < MIN_LENGTH:
        return None
    values = own_values(document.config)
    keys = [key for key in LENGTHS if values.get(key) == plan.settings.length]
    if not keys:
        return None
    return Change(
        tr("shorter rows: longer samples are cut"), (f"{keys[0]}={length}",), plan.machine
    )


def _more_gpus(document: ConfigDocument, plan: Plan) -> Change | None:
    machine = plan.machine
    if machine.ranks * 2 > MOST_GPUS:
        return None
    more = replace(machine, gpus=machine.gpus * 2)
    if plan.settings.sharding.name not in ("fsdp", "zero3"):
        more = replace(more, fsdp=True, deepspeed=None)
    words = ("--fsdp-offload",) if more.offload else ("--fsdp",) if more.fsdp else ()
    return Change(tr("{count} GPUs", count=more.gpus), (), more, words)


STEPS = (
    _checkpointing,
    _batch,
    _sharding,
    _optimizer,
    _offload,
    _adapter,
    _quantize,
    _rank,
    _shorter,
    _more_gpus,
)
"""The changes, those that cost least first."""
