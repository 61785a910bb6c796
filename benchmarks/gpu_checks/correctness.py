"""Stage 1: every kernel and every way of computing against the plain computation.

Shapes: T tokens of a row, H query heads, K key heads, D width of a head of queries and keys, V of
values, N supervised tokens.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import measuring
import torch

from gpu_checks import tiny
from gpu_checks.items import AbsentError, Facts, Item, Setting

GAPS = {"bfloat16": (1e-2, 6e-2), "float16": (2e-3, 1e-2)}
"""Largest relative differences of loss and gradient, by the dtype of products."""
KERNEL_GAPS = {"bfloat16": 2e-2, "float16": 3e-3, "float32": 1e-4}
"""Of the output of attention and its gradients."""


def rates(setting: Setting) -> Facts:
    """What the GPU's matrix products and copies reach."""
    size, numbers = (8192, 2**28) if setting.device == "cuda" else (256, 2**20)
    source = torch.zeros(numbers, dtype=torch.bfloat16, device=setting.device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(8):
        begun = time.perf_counter()
        target.copy_(source)
        if setting.device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return {
        "matmul TFLOP/s": round(measuring.matmul_rate(size, setting.device), 3),
        "copy TB/s": round(2 * 2 * numbers / best / 1e12, 3),
    }


@dataclass(frozen=True)
class Scores:
    """A kind of attention: heads, widths, samples."""

    heads: int
    key_heads: int
    qk_width: int
    v_width: int
    lengths: tuple[int, ...]
    dtype: str = "bfloat16"
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False

    def __str__(self) -> str:
        extra = f" window {self.window}" if self.window else ""
        extra += f" softcap {self.softcap}" if self.softcap else ""
        extra += " sinks" if self.sinks else ""
        heads = f"{self.heads}/{self.key_heads} heads of {self.qk_width}/{self.v_width}"
        return f"{heads}, {sum(self.lengths)} tokens, {self.dtype}{extra}"


SCORES = (
    Scores(8, 8, 64, 64, (1, 7, 300, 64, 129)),
    Scores(8, 2, 128, 128, (500, 11, 40)),
    Scores(28, 4, 128, 128, (2048,)),
    Scores(8, 2, 128, 128, (500, 11, 40), window=100),
    Scores(4, 1, 256, 256, (130, 70), dtype="float16"),
    Scores(8, 4, 64, 64, (5,) * 40, dtype="float16"),
    Scores(4, 2, 64, 64, (260, 90), softcap=30.0),
    Scores(4, 2, 64, 64, (260, 90), window=50, softcap=30.0),
    Scores(4, 2, 64, 64, (260, 90), window=50, sinks=True),
    Scores(4, 4, 192, 128, (100, 33)),
    Scores(4, 2, 80, 80, (100, 33)),
    Scores(4, 2, 36, 36, (100, 33)),
    Scores(2, 2, 512, 512, (64, 33)),
    Scores(8, 2, 64, 64, (300, 40), dtype="float32"),
)


def attention_kernel(setting: Setting, name: str) -> Facts:
    """A kernel for packed rows against torch's SDPA in float32: output and gradients."""
    from xtuner.model.modules import attention

    (backend,) = (each for each in attention.PACKED_BACKENDS if each.name == name)
    if backend.device not in (None, setting.device):
        raise AbsentError(f"it is for a device of type {backend.device}")
    found, unsupported, wrong = {}, {}, []
    for scores in SCORES:
        if setting.dry:
            scores = replace(scores, lengths=tuple(min(n, 9) for n in scores.lengths[:3]))
        why, gaps = _kernel_gaps(backend, scores, setting.device)
        if why is not None:
            unsupported[str(scores)] = why
            continue
        found[str(scores)] = [f"{gap:.1e}" for gap in gaps]
        if max(gaps) > KERNEL_GAPS[scores.dtype]:
            wrong.append(str(scores))
    if not found:
        raise AbsentError("; ".join(sorted(set(unsupported.values()))))
    return {"out, dq, dk, dv": found, "unsupported": unsupported, "wrong": wrong}


def _kernel_gaps(backend: Any, scores: Scores, device: str) -> tuple[str | None, list[float]]:
    """Why the kernel does not support it, or the relative differences."""
    from xtuner.model.backends.interfaces import AttentionOptions, Packing
    from xtuner.model.modules import attention

    torch.manual_seed(0)
    tokens, dtype = sum(scores.lengths), getattr(torch, scores.dtype)
    shapes = (
        (scores.heads, scores.qk_width),
        (scores.key_heads, scores.qk_width),
        (scores.key_heads, scores.v_width),
    )
    tensors = [torch.randn(1, n, tokens, width).to(device, dtype) for n, width in shapes]
    sinks = torch.randn(scores.heads).to(device, dtype) if scores.sinks else None
    options = AttentionOptions(True, None, 0.0, scores.window, scores.softcap, sinks)
    facts = attention.Facts.of(*tensors, max(scores.lengths), options)
    case = replace(facts.case(), packed=True)
    why = backend.supports(case)
    if why is not None:
        return why, []
    boundaries = torch.tensor((0, *scores.lengths)).cumsum(0).to(device, torch.int32)
    packing = Packing(boundaries, max(scores.lengths))
    slope = torch.randn(1, tokens, scores.heads, scores.v_width).to(device)
    outputs = []
    for kernel, kind in ((backend.build(case), dtype), (attention.attend_by_sample, torch.float32)):
        inputs = [tensor.detach().to(kind).requires_grad_() for tensor in tensors]
        own = options._replace(sinks=None if sinks is None else sinks.to(kind))
        out = kernel(*inputs, packing, own)
        outputs.append([out, *torch.autograd.grad(out, inputs, slope.to(out.dtype))])
    return None, [tiny.gap(*pair) for pair in zip(*outputs, strict=True)]


def attention_in_models(setting: Setting, name: str) -> Facts:
    """Models whose packed and padded rows are computed by one kernel, against the plain loss."""
    from xtuner.model.modules import attention
    from xtuner.utils.errors import UserError

    (backend,) = (each for each in attention.PACKED_BACKENDS if each.name == name)
    if backend.device not in (None, setting.device):
        raise AbsentError(f"it is for a device of type {backend.device}")
    attention.PACKED_BACKENDS = (backend,)
    found, wrong, reasons = {}, [], set()
    few = ("qwen2", "gemma2")
    for architecture in few if setting.dry else tiny.ARCHITECTURES:
        for layout in ("packed", "padded"):
            case = f"{architecture} {layout}"
            try:
                model = tiny.finetuned("full", setting.device, architecture, layout == "packed")
                gaps = _gaps(model, "bfloat16", setting.device)
            except UserError as error:
                reasons.add(str(error))
                found[case] = "unsupported"
                continue
            found[case] = [f"{gap:.1e}" for gap in gaps]
            wrong += [case] * _too_far(gaps, "bfloat16")
    if all(each == "unsupported" for each in found.values()):
        raise AbsentError("; ".join(sorted(reasons)))
    return {"loss, gradient": found, "unsupported": sorted(reasons), "wrong": wrong}


def _gaps(model: Any, dtype: str, device: str, scale: float = 1.0) -> list[float]:
    """Relative differences of loss and gradient from the plain computation."""
    return tiny.gaps(tiny.outcome(model, dtype, device, scale), tiny.plain_outcome(model))


def _too_far(gaps: list[float], dtype: str) -> bool:
    return not all(gap <= most for gap, most in zip(gaps, GAPS[dtype], strict=True))  # NaN


def method(
    setting: Setting,
    name: str,
    dtype: str = "bfloat16",
    compiled: bool = False,
    liger: bool = False,
    offload: bool = False,
) -> Facts:
    """Full, LoRA or QLoRA against the plain computation, packed and padded."""
    _use_liger(liger)
    checkpointing = dict(offload=True) if offload else True
    found, wrong, used = {}, [], {}
    scale = 1024.0 if dtype == "float16" else 1.0
    for layout in ("packed", "padded"):
        model = tiny.finetuned(
            name,
            setting.device,
            packed=layout == "packed",
            compiled=compiled,
            checkpointing=checkpointing,
            dtype=dtype,
        )
        gaps = _gaps(model, dtype, setting.device, scale=scale)
        found[layout] = [f"{gap:.1e}" for gap in gaps]
        wrong += [layout] * _too_far(gaps, dtype)
        used = {each.concept: f"{each.name} x {each.modules}" for each in model.backends}
    return {"loss, gradient": found, "by": used, "wrong": wrong}


def _use_liger(use: bool) -> None:
    """Let liger-kernel be used, or not, whatever is installed.

    Raises:
        AbsentError: where it is to be used and cannot.
    """
    from xtuner.model.backends import environment
    from xtuner.model.backends.case import LibraryFunction

    libraries = environment.libraries()
    if use and libraries.liger.error:
        raise AbsentError(libraries.liger.error)
    if not use:
        without = replace(libraries, liger=LibraryFunction("left out"))
        environment.libraries = lambda: without


def loss(setting: Setting) -> Facts:
    """The fused cross-entropy against torch's of all logits, in float32 on the CPU."""
    from xtuner.model.modules.loss import LogitTransform, LossConfig

    plain, terms = LogitTransform(), LossConfig()
    cases: dict[str, tuple[LogitTransform, LossConfig, int, int]] = {
        "plain": (plain, terms, 700, 5000),
        "scale and soft cap": (LogitTransform(0.5, 30.0), terms, 300, 1000),
        "smoothing and z-loss": (plain, LossConfig(0.1, 1e-2), 300, 5000),
        "no token": (plain, terms, 0, 1000),
        "152k words": (plain, terms, 1500, 151936),
    }
    if setting.dry:
        cases = {name: (*case[:2], min(case[2], 20), 500) for name, case in cases.items()}
    found, wrong = {}, []
    for name, case in cases.items():
        for dtype in ("float32", "bfloat16"):
            gaps = _loss_gaps(*case, getattr(torch, dtype), setting.device)
            found[f"{name}, {dtype}"] = [f"{gap:.1e}" for gap in gaps]
            if max(gaps) > (1e-4 if dtype == "float32" else 2e-2):
                wrong.append(f"{name}, {dtype}")
    return {"loss, dhidden, dweight": found, "wrong": wrong}


def _loss_gaps(
    transform: Any, terms: Any, tokens: int, words: int, dtype: torch.dtype, device: str
) -> list[float]:
    """Relative differences of the loss, and of the gradients of hidden states and weight."""
    from xtuner.model.modules.loss import linear_cross_entropy

    torch.manual_seed(0)
    head = torch.nn.Linear(256, words, bias=False, dtype=dtype).to(device)
    hidden = torch.randn(tokens, 256).to(device, dtype).requires_grad_()
    targets = torch.randint(words, (tokens,))
    with torch.autocast(device, torch.bfloat16, enabled=dtype != torch.float32):
        found = linear_cross_entropy(hidden, head, targets.to(device), transform, terms)
    found.backward()
    inputs = [each.detach().float().cpu().requires_grad_() for each in (hidden, head.weight)]
    logits = transform(inputs[0] @ inputs[1].T)
    expected = torch.nn.functional.cross_entropy(
        logits, targets, reduction="sum", label_smoothing=terms.label_smoothing
    )
    if terms.z_loss:
        expected = expected + terms.z_loss * logits.logsumexp(-1).square().sum()
    expected.backward()
    pairs = [(found[None], expected[None]), (hidden.grad, inputs[0].grad)]
    pairs.append((head.weight.grad, inputs[1].grad))
    return [tiny.gap(one.detach(), other.detach()) for one, other in pairs]


def gradient_scaler(setting: Setting) -> Facts:
    """float16: a step whose gradients overflow is left out, the scale halved, others are taken."""
    from xtuner.engine.optim import FinetuneOptimWrapper

    model = tiny.finetuned("full", setting.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    wrapper = FinetuneOptimWrapper(
        optimizer, dtype="float16", device=setting.device, clip_grad=dict(max_norm=1.0)
    )
    if wrapper.scaler is None:
        raise AbsentError("there is a gradient scaler on a GPU only")
    weight, moved, scales = next(model.parameters()), [], [wrapper.scaler.get_scale()]
    data, counts = tiny.batch_of(model, setting.device)
    for step in range(4):
        before = weight.detach().clone()
        with wrapper.optim_context(model):
            found = model(data, mode="loss", num_items_in_batch=counts)["loss"]
        wrapper.backward(found * float("inf") if step == 2 else found)
        wrapper.clip()
        wrapper.step()
        wrapper.zero_grad()
        moved.append(not torch.equal(before, weight))
        scales.append(wrapper.scaler.get_scale())
    right = moved == [True, True, False, True] and scales[3] == scales[2] / 2
    right = right and bool(weight.isfinite().all())
    return {"moved": moved, "scales": scales, "wrong": not right}


def eight_bits(setting: Setting) -> Facts:
    """Three steps of AdamW8bit, saved and resumed after two, against those of a CPU."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise AbsentError(str(error)) from None
    from xtuner.engine.optim import FinetuneOptimWrapper

    outcomes = []
    for device in (setting.device, "cpu"):
        draw = torch.Generator().manual_seed(0)
        weight = torch.randn(256, 64, generator=draw).to(device).requires_grad_()
        wrapper = FinetuneOptimWrapper(AdamW8bit([weight], lr=1e-2))
        for step in range(3):
            if step == 2:
                state = wrapper.state_dict()
                wrapper = FinetuneOptimWrapper(AdamW8bit([weight], lr=1e-2))
                wrapper.load_state_dict(state)
            weight.grad = torch.randn(256, 64, generator=draw).to(device)
            wrapper.step()
        outcomes.append(weight.detach())
    off = tiny.gap(*outcomes)
    return {"gap": f"{off:.1e}", "wrong": not off < 1e-3}


class _Waits(measuring.Clock):
    """Counts, from the first timed step on, what the host waits for the GPU for."""

    def __init__(self, warm: int, timed: int, said: list[Any]) -> None:
        super().__init__(warm, timed)
        self.said, self.begin = said, 0

    def step(self, tokens: int, loss: float) -> None:
        super().step(tokens, loss)
        if len(self._steps) == self.warm:
            self.begin = len(self.said)

    def count(self) -> Counter[str]:
        """Waits of all timed steps, by line; those of the clock itself are left out."""
        waits = [each for each in self.said[self.begin :] if "synchroniz" in str(each.message)]
        places = [(Path(each.filename), each.lineno) for each in waits]
        here = Path(measuring.__file__)
        return Counter(f"{'/'.join(p.parts[-2:])}:{line}" for p, line in places if p != here)


def steps(setting: Setting) -> Facts:
    """Full, LoRA and QLoRA by the training loop: the loss falls, the host waits thrice at most."""
    found, wrong = {}, []
    for name in ("full", "lora", "qlora"):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            clock = _Waits(3, 5, said)
            _train(name, setting, clock)
        waits = clock.count()
        losses = [round(loss, 3) for *_, loss in clock._steps]
        found[name] = {"losses": losses, "waits of 5 steps": dict(waits)}
        if not losses[-1] < losses[0] or sum(waits.values()) > 3 * 5:
            wrong.append(name)
    return found | {"wrong": wrong}


def _train(name: str, setting: Setting, clock: measuring.Clock) -> None:
    llm = tiny.causal_lm(
        "qwen2", torch.float32 if name == "full" else torch.bfloat16, setting.device
    )
    if name == "qlora":
        tiny.quantize(llm, setting.device)
    ids = torch.arange(5, 69).tolist()
    row = {"input_ids": ids, "labels": ids, "cumulative_len": [0, 40, len(ids)]}
    folder = setting.folder / name
    model = dict(llm=llm, lora=measuring.adapter(name))
    if setting.device == "cuda":
        torch.cuda.set_sync_debug_mode("warn")
    measuring.run_ours(folder, model, [row] * clock.total, 1, clock, setting.device)


def items() -> list[Item]:
    """The checks of this file."""
    from xtuner.model.modules.attention import PACKED_BACKENDS

    found = [Item("rates", 1, rates, 30, alone=True), Item("loss", 1, loss)]
    for name in ("full", "lora", "qlora"):
        found.append(Item(f"method/{name}", 1, partial(method, name=name)))
    for backend in PACKED_BACKENDS:
        kernel = partial(attention_kernel, name=backend.name)
        in_models = partial(attention_in_models, name=backend.name)
        found.append(Item(f"attention/{backend.name}/kernel", 1, kernel, 90))
        found.append(Item(f"attention/{backend.name}/models", 1, in_models, 90))
    found.append(Item("steps", 1, steps))
    for name in ("full", "lora"):
        liger = partial(method, name=name, liger=True)
        compiled = partial(method, name=name, compiled=True)
        half = partial(method, name=name, dtype="float16")
        found.append(Item(f"liger/{name}", 1, liger))
        found.append(Item(f"float16/{name}", 1, half))
        found.append(Item(f"compile/{name}", 1, compiled, 120))
    found.append(Item("offload/lora", 1, partial(method, name="lora", offload=True)))
    found.append(Item("float16/scaler", 1, gradient_scaler))
    found.append(Item("optimizer/AdamW8bit", 1, eight_bits))
    return found
