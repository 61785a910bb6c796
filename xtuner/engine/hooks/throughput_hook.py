"""How fast a training is: tokens and operations per second, and the share of what is possible."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from torch import nn

from xtuner.model.activation_checkpointing import recomputed_share
from xtuner.parallel.sequence.groups import get_sequence_parallel_world_size

if TYPE_CHECKING:
    from xtuner.engine.runner.finetune_runner import FinetuneRunner

PEAK_SIZE = {"cuda": 8192, "cpu": 1024}
PEAK_SECONDS = 0.2


@HOOKS.register_module()
class ThroughputHook(Hook):
    """Logs ``tokens_per_sec``, ``tflops`` and ``mfu`` (share of the peak), per process.

    The peak is measured before the training with a large matrix product in the number format of
    the training, unless it is given. The operations of a step follow from the model: 2 per weight
    of a matrix and token forward, as many backward for the activations, as many for each weight
    that is trained, and the forward once more under activation checkpointing; of the attention 4
    per token, earlier token and unit of width, and as much again as for the rest.

    Args:
        peak_tflops: what the device can do, in TFLOP/s; measured when None.
    """

    priority = "BELOW_NORMAL"

    def __init__(self, peak_tflops: float | None = None) -> None:
        self.peak_tflops = peak_tflops
        self._cost = (0.0, 0.0)
        self._tokens = self._squares = 0.0

    def before_train(self, runner: FinetuneRunner) -> None:
        """Work out what a token costs, and measure what the device can do."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self._cost = cost_of_a_token(model)
        if self.peak_tflops is None:
            dtype = getattr(runner.optim_wrapper, "dtype", torch.float32)
            self.peak_tflops = measured_peak(runner.device, dtype)

    def after_train_iter(
        self,
        runner: FinetuneRunner,
        batch_idx: int,
        data_batch: Mapping[str, Any] | None = None,
        outputs: Mapping[str, Any] | None = None,
    ) -> None:
        """Add up the micro-batches of a step; log at its end."""
        data = (data_batch or {}).get("data", {})
        ids = data.get("input_ids")
        if isinstance(ids, torch.Tensor):
            ranks = get_sequence_parallel_world_size()  # they share the work of these rows
            self._tokens += ids.numel() / ranks
            self._squares += attended(data) / ranks
        if not outputs or not runner.train_loop.step_finished:
            return
        seconds = outputs["step_time"]
        operations = self._tokens * self._cost[0] + self._squares * self._cost[1]
        tflops = operations / seconds / 1e12
        for name, value in (
            ("tokens_per_sec", self._tokens / seconds),
            ("tflops", tflops),
            ("mfu", tflops / self.peak_tflops if self.peak_tflops else 0.0),
        ):
            runner.message_hub.update_scalar(f"train/{name}", value)
        self._tokens = self._squares = 0.0


def attended(data: dict[str, Any]) -> int:
    """Sum over the samples of a batch of the square of their length."""
    cu_seqlens = data.get("cumulative_len")
    if cu_seqlens:
        return sum(int(((b[1:] - b[:-1]).long() ** 2).sum()) for b in cu_seqlens)
    rows, length = data["input_ids"].shape
    return rows * length * length


def cost_of_a_token(model: nn.Module) -> tuple[float, float]:
    """Operations of a training step per token, and per pair of tokens in a sample."""
    forward = trained = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            state = getattr(module.weight, "quant_state", None)
            count = state.shape.numel() if state is not None else module.weight.numel()
            forward += 2 * count
            trained += 2 * count if module.weight.requires_grad else 0
    passes = 2 + recomputed_share(model)
    config = getattr(getattr(model, "llm", model), "config", None)
    width = getattr(config, "hidden_size", 0) or 0
    layers = getattr(config, "num_hidden_layers", 0) or 0
    # causal: half of 4 operations a pair; backward twice the forward
    return forward * passes + trained, 2.0 * width * layers * (passes + 1)


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large matrix product."""
    size = PEAK_SIZE.get(device.type, 1024)
    a = torch.ones(size, size, device=device, dtype=dtype)
    torch.mm(a, a)
    best = 0.0
    end = time.perf_counter() + PEAK_SECONDS
    while time.perf_counter() < end:
        _wait(device)
        start = time.perf_counter()
        torch.mm(a, a)
        _wait(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start) / 1e12)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
