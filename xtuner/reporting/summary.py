"""What people are told before and after a training: facts of the run, and what to type next."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from xtuner.checkpoint.run_state import bare
from xtuner.dataset.prepare.token_stats import accounts_of
from xtuner.engine.optim import FinetuneOptimWrapper
from xtuner.parallel.sequence.groups import (
    get_data_parallel_world_size,
    get_sequence_parallel_world_size,
)
from xtuner.utils.files import write_text
from xtuner.utils.lang import tr
from xtuner.utils.templates import PROMPT_TEMPLATE


def facts(runner: Any) -> list[tuple[str, str]]:
    """What will be trained on what and where it goes, as (label, value)."""
    loop = runner.train_loop
    trained, total = count_parameters(bare(runner.model))
    lines = [
        (tr("model", "模型"), base_model(runner) or type(bare(runner.model)).__name__),
        (
            tr("parameters", "参数"),
            tr(
                f"{_short(total)}, {_short(trained)} trained ({trained / total:.2%})",
                f"{_short(total)}，训练 {_short(trained)}（{trained / total:.2%}）",
            ),
        ),
        (tr("data", "数据"), _data(loop)),
        (tr("steps", "步数"), _steps(runner)),
        (tr("optimizer", "优化器"), _optimizer(runner)),
        (tr("precision", "精度"), _precision(runner)),
        (tr("device", "设备"), ", ".join([_device(runner), *runner.readiness])),
        (tr("output", "输出"), runner.work_dir),
    ]
    if loop.iter:
        note = tr(f"after iteration {loop.iter}", f"从第 {loop.iter} 次迭代之后")
        lines.append((tr("resumed", "继续"), note))
    return lines


def next_steps(runner: Any) -> list[tuple[str, str]]:
    """The commands that turn the last checkpoint into a model to talk to, as (label, command)."""
    hub = runner.message_hub
    if "last_ckpt" not in hub.runtime_info or hub.get_info("last_ckpt") is None:
        return []
    work_dir = Path(runner.work_dir)
    base = base_model(runner)
    config = work_dir / f"{Path(runner.cfg.filename or 'config').stem}.py"
    checkpoint, out = Path(hub.get_info("last_ckpt")), work_dir / "hf"
    steps = [
        (
            tr("convert to Hugging Face format:", "转换为 Hugging Face 格式:"),
            _command("convert", "pth_to_hf", config, checkpoint, out),
        )
    ]
    chat = [out]
    model = runner.cfg.get("model") or {}
    has_adapter = model.get("lora") is not None and base
    if getattr(model.get("type"), "__name__", "") == "RewardModel":
        judge = [base, "--adapter", out] if has_adapter else [out]
        return [*steps, (tr("score answers with it:", "用它给回答打分:"), _command("chat", *judge))]
    if has_adapter:
        merged = work_dir / "merged"
        steps.append(
            (
                tr("merge the adapter into the model:", "把适配器合并进模型:"),
                _command("convert", "merge", base, out, merged),
            )
        )
        chat = [merged]
    template = template_name(runner.cfg)
    words = [*chat, *(("--prompt-template", template) if template else ())]
    steps.append((tr("talk to it:", "与它对话:"), _command("chat", *words)))
    return steps


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Trained and all parameters, a 4-bit one counted by what it stands for."""
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


def base_model(runner: Any) -> str | None:
    """The path or name of the model that a config starts from."""
    name = _llm(runner.cfg).get("pretrained_model_name_or_path")
    name = name or runner.cfg.get("pretrained_model_name_or_path")
    return str(name) if name else None


def _llm(cfg: Any) -> Any:
    return (cfg.get("model") or {}).get("llm") or {}


def template_name(cfg: Any) -> str | None:
    """The published name of the template that a config trains with, where it has one."""
    wanted = cfg.get("prompt_template")
    for name, template in PROMPT_TEMPLATE.items():
        if wanted and wanted in (name, template):
            return name
    return None


def _data(loop: Any) -> str:
    """Rows read, packs made of them, tokens, and what was left out and why."""
    dataset = loop.dataloader.dataset
    accounts = accounts_of(dataset)
    tokens = sum(lengths(dataset))
    packed = "cumulative_len" in (getattr(dataset, "column_names", None) or ())
    kind = tr("packs", "个打包") if packed else tr("rows", "行")
    text = f"{_length(dataset):,} {kind}" + (f", {tokens:,} tokens" if tokens else "")
    if not accounts:
        return text
    read = sum(account.rows_in for account in accounts)
    supervised = sum(account.tokens_supervised for account in accounts)
    text = tr(f"{read:,} rows read, ", f"读入 {read:,} 行，") + text
    text += tr(f" ({supervised:,} with loss)", f"（计算损失 {supervised:,}）")
    return "\n  ".join([text, *(line for account in accounts for line in account.losses())])


def write_account(runner: Any) -> None:
    """Write where all rows and tokens went to ``account.json`` in the work dir."""
    accounts = accounts_of(runner.train_loop.dataloader.dataset)
    if accounts:
        text = json.dumps([asdict(account) for account in accounts], indent=1)
        write_text(Path(runner.work_dir) / "account.json", text + "\n")


def lengths(dataset: Any) -> Iterator[int]:
    """The tokens of each row; nothing where the dataset does not know them."""
    if "length" in (getattr(dataset, "column_names", None) or ()):
        yield from dataset["length"]


def _length(dataset: Any) -> int:
    return len(dataset) if hasattr(dataset, "__len__") else 0


def _steps(runner: Any) -> str:
    loop = runner.train_loop
    text = tr(
        f"{loop.max_steps:,} optimizer steps, {loop.max_iters:,} micro-batches",
        f"{loop.max_steps:,} 个优化器步，{loop.max_iters:,} 个 micro-batch",
    )
    if loop.epoch_length:
        epochs = loop.max_iters / loop.epoch_length
        text += tr(f", {epochs:g} epoch{'s' * (epochs != 1)}", f"，{epochs:g} 个 epoch")
    size = loop.dataloader.batch_size or 1
    per_step = f"{size} x {loop.accumulative_counts} x {get_data_parallel_world_size()}"
    return text + tr(
        f" (rows of a step: {per_step})", f"（每步数据: {per_step}）"
    )  # batch x accumulation x processes (or groups that share rows)


def _optimizer(runner: Any) -> str:
    wrapper = runner.optim_wrapper
    kind = type(wrapper.optimizer).__name__
    rates = sorted({group.get("initial_lr", group["lr"]) for group in wrapper.param_groups})
    return f"{kind}, lr {', '.join(f'{rate:g}' for rate in rates)}"


def _precision(runner: Any) -> str:
    wrapper = runner.optim_wrapper
    weights = sorted({str(p.dtype).removeprefix("torch.") for p in runner.model.parameters()})
    if "uint8" in weights:
        weights = [*(name for name in weights if name != "uint8"), tr("4 bits", "4 比特")]
    text = tr(f"weights in {', '.join(weights)}", f"权重 {', '.join(weights)}")
    if isinstance(wrapper, FinetuneOptimWrapper) and wrapper.dtype is not torch.float32:
        name = str(wrapper.dtype).removeprefix("torch.")
        text += tr(f", computed in {name}", f"，计算 {name}")
    return text


def _device(runner: Any) -> str:
    device = runner.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    count = runner.world_size
    text = name if count == 1 else tr(f"{count} x {name}", f"{count} 个 {name}")
    if count > 1 or runner.strategy.name != "ddp":
        text += f", {runner.strategy}"
    sharing = get_sequence_parallel_world_size()
    note = tr(f", {sharing} to a row", f"，每行由 {sharing} 个进程共享") if sharing > 1 else ""
    return text + note


def _short(count: int) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= limit:
            return f"{count / limit:.3g}{unit}"
    return str(count)


def _command(*words: Any) -> str:
    return shlex.join(["xtuner", *map(str, words)])
