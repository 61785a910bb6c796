"""What to change where a run does not fit: the cheapest first, each with its new sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from xtuner.config.document import ConfigDocument
from xtuner.config.override import override
from xtuner.config.signatures import parameters_of
from xtuner.config.values import last_name, own_values
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
    "dict(type='transformers.BitsAndBytesConfig',load_in_4bit=True,bnb_4bit_compute_dtype='{dtype}',"
    "bnb_4bit_quant_type='nf4',bnb_4bit_use_double_quant=True)"
)
LORA = (
    "dict(type='peft.LoraConfig',r=16,lora_alpha=32,lora_dropout=0.0,bias='none',"
    "task_type='{task}')"
)
LR_OF_ADAPTERS = 2e-4
"""That of the catalogue's adapters for supervised fine-tuning."""
ADAMW_8BIT, PAGED = "bitsandbytes.optim.AdamW8bit", "bitsandbytes.optim.PagedAdamW8bit"
SETTINGS = {
    "batch_size": "train_dataloader.batch_size",
    "accumulative_counts": "optim_wrapper.accumulative_counts",
    "optim_type": "optim_wrapper.optimizer.type",
    "lr": "optim_wrapper.optimizer.lr",
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


Step = Callable[[ConfigDocument, Plan], Change | None]
"""Finds a change of a run that does not fit; None where there is none."""


@dataclass(frozen=True)
class Remedy:
    """A change, the plan with it and with those before it, and what finds such changes."""

    change: Change
    plan: Plan
    step: Step


def remedies(planner: Planner, document: ConfigDocument, plan: Plan) -> list[Remedy]:
    """The changes, one on top of the other, with which a run fits.

    A change that saves nothing is left out; one that is made again takes the place of the first.

    Args:
        planner: made ``plan``.
        document: the config that was planned.
        plan: one that does not fit.

    Returns:
        In order; the last plan fits, unless nothing does.
    """
    original = document
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
            if found and found[-1].step is step:
                del found[-1]
            document, plan = changed, better
            found.append(Remedy(change, plan, step))
    return _needed(planner, original, found) if plan.fits else found


def _needed(planner: Planner, document: ConfigDocument, found: list[Remedy]) -> list[Remedy]:
    """Leave out what later changes have made needless: 8-bit states once an adapter is trained."""
    for each in found[-2::-1]:  # what costs most is tried first
        if each.step in CHANGE_GPUS:
            continue
        others = [other for other in found if other.change is not each.change]
        try:
            fewer = list(_one_by_one(planner, document, others))
        except UserError:  # a later change is of this one
            continue
        if fewer[-1].plan.fits:
            found = fewer
    return found


def _one_by_one(
    planner: Planner, document: ConfigDocument, found: Sequence[Remedy]
) -> Iterator[Remedy]:
    """The same changes, each with the plan that it and those before it give."""
    for each in found:
        document = override(document, each.change.options)
        yield replace(each, plan=planner.plan(document, each.change.machine))


def options_of(found: Sequence[Remedy], given: Sequence[str] = ()) -> list[str]:
    """The words of ``--cfg-options`` of all changes, after those given; of one key the last."""
    words = [*given, *(word for each in found for word in each.change.options)]
    return list({word.partition("=")[0]: word for word in words}.values())


def _checkpointing(document: ConfigDocument, plan: Plan) -> Change | None:
    chosen = plan.settings.checkpointing
    if chosen is not None and chosen.every_n_layers == 1:
        return None
    setting = "dict(offload=True)" if chosen is not None and chosen.offload else "True"
    return Change(
        tr("recompute activations in the backward pass (a third more time)"),
        (f"model.use_activation_checkpointing={setting}",),
        plan.machine,
    )


def _inputs(document: ConfigDocument, plan: Plan) -> Change | None:
    """Nothing is computed twice for it; the copies go on beside the layers."""
    chosen = plan.settings.checkpointing
    if chosen is None or chosen.offload:
        return None
    return Change(
        tr("keep the inputs of recomputed layers in main memory"),
        ("model.use_activation_checkpointing=dict(offload=True)",),
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


def _paged(document: ConfigDocument, plan: Plan) -> Change | None:
    if plan.settings.optimizer != "AdamW8bit":
        return None
    return Change(
        tr("an optimizer whose state moves to main memory where the GPU is full (bitsandbytes)"),
        (_option(document, "optim_type", PAGED),),
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


def _adapter_key(model: dict[str, Any]) -> str:
    """The setting for an adapter of the language model."""
    known = parameters_of(dict.get(model, "type"))
    return "llm_lora" if known is not None and "llm_lora" in known.names else "lora"


def _quantize(document: ConfigDocument, plan: Plan) -> Change | None:
    """Where the language model is frozen, with an adapter or without."""
    model, dtype = _model(document), plan.settings.dtype
    llm = dict.get(model, "llm")
    adapter = dict.get(model, _adapter_key(model))
    if adapter is None and not dict.get(model, "freeze_llm"):
        return None
    what = tr("keep the frozen weights in 4 bits (QLoRA)")
    if not isinstance(llm, dict):  # InternVL 1.5 and 2 load their parts themselves
        known = parameters_of(dict.get(model, "type"))
        if known is None or "quantization_llm" not in known.names or adapter is None:
            return None
        return Change(what, ("model.quantization_llm=True",), plan.machine)
    if dict.get(llm, "quantization_config") is not None:
        return None
    setting = BITS_4.format(dtype="bfloat16" if dtype == "float32" else dtype)
    return Change(what, (f"model.llm.quantization_config={setting}",), plan.machine)


def _adapter(document: ConfigDocument, plan: Plan) -> Change | None:
    """LoRA in place of full training: the base in 16 bits, the learning rate of adapters."""
    model = _model(document)
    llm = dict.get(model, "llm")
    if any(dict.get(model, each) for each in ("lora", "llm_lora", "peft_model", "freeze_llm")):
        return None
    is_reward = last_name(dict.get(model, "type")) == "RewardModel"
    adapter = LORA.format(task="FEATURE_EXTRACTION" if is_reward else "CAUSAL_LM")
    options = [f"model.{_adapter_key(model)}={adapter}"]
    if isinstance(llm, dict):
        half = "float16" if plan.settings.dtype == "float16" else "bfloat16"
        options.append(f"model.llm.dtype={half}")
    if plan.settings.sequences == 1:
        options.append(_option(document, "lr", LR_OF_ADAPTERS))
    return Change(
        tr("train an adapter in place of all weights (LoRA)"), tuple(options), plan.machine
    )


def _rank(document: ConfigDocument, plan: Plan) -> Change | None:
    model = _model(document)
    key = _adapter_key(model)
    lora = dict.get(model, key)
    if not isinstance(lora, dict):
        return None
    rank = dict.get(lora, "r")
    if not isinstance(rank, int) or rank <= USUAL_RANK:
        return None
    alpha = dict.get(lora, "lora_alpha")
    options = [f"model.{key}.r={USUAL_RANK}"]
    if isinstance(alpha, int | float):  # the adapter's scale, alpha / r, stays
        options.append(f"model.{key}.lora_alpha={alpha * USUAL_RANK / rank:g}")
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
    _inputs,
    _sharding,
    _optimizer,
    _paged,
    _offload,
    _adapter,
    _quantize,
    _rank,
    _shorter,
    _more_gpus,
)
"""The changes, those that cost least first."""
CHANGE_GPUS = (_sharding, _offload, _more_gpus)
"""Those of them after which the machine is another one."""
