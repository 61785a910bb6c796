"""The summary of a run before it trains, its record in ``run.json``, and the next commands."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from xtuner.dataset.prepare.token_stats import all_token_stats
from xtuner.parallel.sequence.groups import (
    get_data_parallel_world_size,
    get_sequence_parallel_world_size,
)
from xtuner.parallel.unwrap import unwrap_model
from xtuner.reporting.checkpoint_disk import checkpoint_disk
from xtuner.utils.constants import RUN_RECORD
from xtuner.utils.few_steps import few_steps_advice
from xtuner.utils.files import write_text
from xtuner.utils.lang import tr
from xtuner.utils.templates import AUTO_TEMPLATE, PROMPT_TEMPLATE

if TYPE_CHECKING:
    from mmengine.config import Config
    from torch.utils.data import Dataset

    from xtuner.utils.types import Runner


def run_summary(runner: Runner) -> list[tuple[str, str]]:
    """What will be trained, on which data and device, and where it goes, as (label, value)."""
    loop = runner.train_loop
    trained, total = count_parameters(unwrap_model(runner.model))
    lines = [
        (tr("model"), base_model(runner) or type(unwrap_model(runner.model)).__name__),
        (
            tr("parameters"),
            tr(
                "{total}, {trained} trained ({share:.2%})",
                total=_short(total),
                trained=_short(trained),
                share=trained / total,
            ),
        ),
        (tr("data"), _data(loop)),
        (tr("steps"), _steps(runner)),
        (tr("optimizer"), _optimizer(runner)),
        (tr("precision"), _precision(runner)),
        (tr("device"), tr(", ").join([_device(runner), *runner.readiness])),
        (tr("output"), runner.work_dir),
    ]
    chosen = backends(runner)
    if chosen:
        lines.insert(
            -1, (tr("backends"), tr("; ").join(f"{what} {name}" for what, name, _ in chosen))
        )
    disk = checkpoint_disk(runner, trained)
    if disk is not None:
        lines.append((tr("checkpoints"), str(disk)))
        if not disk.is_enough:
            note = tr("the disk has no room for these checkpoints; set max_keep_ckpts lower")
            lines.append((tr("warning"), note))
    by_epochs = (runner.cfg.get("train_cfg") or {}).get("max_epochs") is not None
    epoch_length = loop.epoch_length if by_epochs else None
    advice = few_steps_advice(loop.max_iters, loop.accumulative_counts, epoch_length)
    if advice:
        lines.append((tr("warning"), advice))
    if loop.iter:
        note = tr("after iteration {iter}", iter=loop.iter)
        lines.append((tr("resumed"), note))
    return lines


def backends(runner: Runner) -> list[tuple[str, str, str]]:
    """The implementations that the model has chosen, as (concept, choice, reason)."""
    report = getattr(unwrap_model(runner.model), "backends_report", None)
    dtype = getattr(runner.optim_wrapper, "dtype", torch.float32)
    autocast = None if dtype is torch.float32 else dtype
    return list(report(autocast)) if report is not None else []


def write_run(runner: Runner) -> None:
    """Write what the run trains, with which implementations and versions, to ``run.json``."""
    record = {
        "config": _config_file(runner).name,
        "summary": dict(run_summary(runner)),
        "backends": [
            {"concept": what, "choice": name, "reason": reason}
            for what, name, reason in backends(runner)
        ],
        "packages": runner.fingerprints.get("packages", {}),
    }
    text = json.dumps(record, indent=1, ensure_ascii=False)
    write_text(Path(runner.work_dir) / RUN_RECORD, text + "\n")


def next_steps(runner: Runner) -> list[tuple[str, str]]:
    """The commands that turn the last checkpoint into a model to chat with: (label, command)."""
    hub = runner.message_hub
    if "last_ckpt" not in hub.runtime_info or hub.get_info("last_ckpt") is None:
        return []
    work_dir = Path(runner.work_dir)
    base = base_model(runner)
    config = _config_file(runner)
    checkpoint, out = Path(hub.get_info("last_ckpt")), work_dir / "hf"
    steps = [
        (
            tr("convert to Hugging Face format:"),
            _command("convert", "pth_to_hf", config, checkpoint, out),
        )
    ]
    chat = [out]
    if _sees(runner.cfg):
        return steps  # convert says how the model is asked about an image
    model = runner.cfg.get("model") or {}
    has_adapter = model.get("lora") is not None and base
    if getattr(model.get("type"), "__name__", "") == "RewardModel":
        judge = [base, "--adapter", out] if has_adapter else [out]
        return [*steps, (tr("score answers with it:"), _command("chat", *judge))]
    if has_adapter:
        merged = work_dir / "merged"
        steps.append(
            (
                tr("merge the adapter into the model:"),
                _command("convert", "merge", base, out, merged),
            )
        )
        chat = [merged]
    template = template_name(runner.cfg)
    words = [*chat, *(("--prompt-template", template) if template else ())]
    steps.append((tr("chat with it:"), _command("chat", *words)))
    return steps


def _config_file(runner: Runner) -> Path:
    """The run's own copy of its config."""
    return Path(runner.work_dir) / f"{Path(runner.cfg.filename or 'config').stem}.py"


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Trained and all parameters; of 4-bit weights the parameters they encode are counted."""
    trained = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        # ds_numel: of a parameter of which ZeRO-3 has left only a part here
        count = getattr(parameter, "ds_numel", parameter.numel())
        count = state.shape.numel() if state is not None else count
        if state is None and parameter.dtype == torch.uint8:
            count *= 2  # experts in 4 bits: two in a byte
        total += count
        trained += count if parameter.requires_grad else 0
    return trained, max(1, total)


def base_model(runner: Runner) -> str | None:
    """The path or name of the model that a config starts from."""
    name = _llm(runner.cfg).get("pretrained_model_name_or_path")
    name = name or runner.cfg.get("pretrained_model_name_or_path")
    return str(name) if name else None


def _sees(cfg: Config) -> bool:
    """Whether the model is one for images."""
    return bool({"visual_encoder", "vit", "model_path"} & set(cfg.get("model") or {}))


def _llm(cfg: Config) -> Any:
    return (cfg.get("model") or {}).get("llm") or {}


def template_name(cfg: Config) -> str | None:
    """The published name of the template that a config trains with, where it has one.

    None for the tokenizer's own template, too.
    """
    wanted = cfg.get("prompt_template")
    for name, template in PROMPT_TEMPLATE.items():
        if wanted and wanted in (name, template) and template != AUTO_TEMPLATE:
            return name
    return None


def _data(loop: Any) -> str:
    """Rows read, packs made of them, tokens, and what was left out and why."""
    dataset = loop.dataloader.dataset
    all_stats = all_token_stats(dataset)
    tokens = sum(lengths(dataset))
    stored = getattr(dataset, "table", dataset)
    packed = "cumulative_len" in (getattr(stored, "column_names", None) or ())
    count = _length(dataset)
    text = tr("{count:,} packs", count=count) if packed else tr("{count:,} rows", count=count)
    text += tr(", {tokens:,} tokens", tokens=tokens) if tokens else ""
    if not all_stats:
        return text
    read = sum(stats.rows_in for stats in all_stats)
    supervised = sum(stats.tokens_supervised for stats in all_stats)
    if packed or read != count:
        text = tr("{read:,} rows read, ", read=read) + text
    text += tr(" ({supervised:,} with loss)", supervised=supervised)
    return "\n  ".join([text, *(line for stats in all_stats for line in stats.losses())])


def write_account(runner: Runner) -> None:
    """Write what became of all rows and tokens to ``account.json`` in the work dir."""
    all_stats = all_token_stats(runner.train_loop.dataloader.dataset)
    if all_stats:
        text = json.dumps([stats.to_dict() for stats in all_stats], indent=1)
        write_text(Path(runner.work_dir) / "account.json", text + "\n")


def lengths(dataset: Dataset[Any]) -> Iterator[int]:
    """The tokens of each row; nothing where the dataset does not know them."""
    stored: Any = getattr(dataset, "table", dataset)
    if "length" in (getattr(stored, "column_names", None) or ()):
        yield from stored["length"]


def _length(dataset: Dataset[Any]) -> int:
    return len(dataset) if hasattr(dataset, "__len__") else 0


def _steps(runner: Runner) -> str:
    loop = runner.train_loop
    text = tr(
        "{max_steps:,} optimizer steps, {max_iters:,} micro-batches",
        max_steps=loop.max_steps,
        max_iters=loop.max_iters,
    )
    if loop.epoch_length:
        epochs = loop.max_iters / loop.epoch_length
        text += tr(", 1 epoch") if epochs == 1 else tr(", {epochs:g} epochs", epochs=epochs)
    size = loop.dataloader.batch_size or 1
    per_step = f"{size} x {loop.accumulative_counts} x {get_data_parallel_world_size()}"
    return text + tr(
        " (rows of a step: {per_step})", per_step=per_step
    )  # batch x accumulation x processes (or groups that share rows)


def _optimizer(runner: Runner) -> str:
    wrapper = runner.optim_wrapper
    kind = type(wrapper.optimizer).__name__
    rates = sorted({group.get("initial_lr", group["lr"]) for group in wrapper.param_groups})
    return f"{kind}, lr {', '.join(f'{rate:g}' for rate in rates)}"


def _precision(runner: Runner) -> str:
    wrapper = runner.optim_wrapper
    weights = sorted({str(p.dtype).removeprefix("torch.") for p in runner.model.parameters()})
    if "uint8" in weights:
        weights = [*(name for name in weights if name != "uint8"), tr("4 bits")]
    text = tr("weights in {weights}", weights=", ".join(weights))
    dtype = getattr(wrapper, "dtype", torch.float32)  # mmengine's wrappers do not name theirs
    if dtype is not torch.float32:
        name = str(dtype).removeprefix("torch.")
        text += tr(", computed in {name}", name=name)
    return text


def _device(runner: Runner) -> str:
    device = runner.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    count = runner.world_size
    text = name if count == 1 else tr("{count} x {name}", count=count, name=name)
    if count > 1 or runner.strategy.name != "ddp":
        text += f", {runner.strategy}"
    sharing = get_sequence_parallel_world_size()
    note = tr(", {sharing} to a row", sharing=sharing) if sharing > 1 else ""
    return text + note


def _short(count: int) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= limit:
            return f"{count / limit:.3g}{unit}"
    return str(count)


def _command(*words: object) -> str:
    return shlex.join(["xtuner", *map(str, words)])
