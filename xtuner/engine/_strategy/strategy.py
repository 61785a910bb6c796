"""The plain strategy, a full copy of the model in each process, and the interface of all of them.

The runner calls its strategy in this order: ``prepare`` (nothing is built), ``wrap`` (the model is
built), ``setup`` (the optimizer is built), then for each micro-batch ``micro_batch``, for passes
over data without gradients ``map_batches``, for checkpoints ``state_dict``, ``save``, ``restore``
and ``load_weights``, and for exports ``full_params``.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from mmengine.dist import get_rank, get_world_size
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from xtuner.checkpoint import checkpoint, run_state
from xtuner.parallel.unwrap import unwrap_model
from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from xtuner.engine.optim import FinetuneOptimWrapper

Context = contextlib.AbstractContextManager[None]
B = TypeVar("B")
T = TypeVar("T")


class Strategy:
    """One process, or several with ``DistributedDataParallel``; checkpoints are single files."""

    name = "ddp"

    def __str__(self) -> str:
        """The name shown to users."""
        return {"ddp": "DDP", "fsdp": "FSDP"}.get(self.name, self.name)

    def prepare(self) -> None:
        """Get ready before the model is built; the processes have been joined."""

    def wrap(self, model: nn.Module, device: torch.device, settings: Mapping[str, Any]) -> Any:
        """Put a model where it computes and make the processes share its gradients.

        Args:
            model: as the config builds it.
            device: of this process.
            settings: keywords of ``DistributedDataParallel``, for this strategy alone.

        Returns:
            What the loop calls in place of the model.
        """
        model = model.to(device)
        if get_world_size() == 1:
            return model
        devices = [device.index] if device.type == "cuda" else None
        with warnings.catch_warnings():  # newer versions of torch rename broadcast_buffers
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(model, device_ids=devices, **settings)

    def setup(self, model: nn.Module, optim: FinetuneOptimWrapper) -> tuple[Any, Any]:
        """Take over the optimizer.

        Args:
            model: from ``wrap``.
            optim: the optimizer wrapper of the config.

        Returns:
            The model and the optimizer wrapper that the loop uses from now on.
        """
        return model, optim

    def micro_batch(self, model: nn.Module, *, last: bool) -> Context:
        """The context of forward and backward of a micro-batch.

        Args:
            model: from ``wrap`` or ``bind``.
            last: of its optimizer step; before it gradients need not be exchanged.
        """
        if last or not isinstance(model, DistributedDataParallel):
            return contextlib.nullcontext()
        return model.no_sync()

    @torch.no_grad()
    def map_batches(
        self,
        model: nn.Module,
        batches: Iterable[tuple[B, bool]],
        fn: Callable[[nn.Module, B], T],
    ) -> list[T]:
        """Apply a function to the batches of a dataset, without gradients and without dropout.

        FSDP and ZeRO gather weights in every forward, so every rank must run as many: each is given
        the same number of batches, some of which do not count (``ShardedBatches``).

        Args:
            model: as the loop calls it, with its wrapper.
            batches: pairs of a batch and whether its result counts.
            fn: calls the model (not what is inside its wrapper) once with a batch.

        Returns:
            The results that count, in the order of this rank's batches.
        """
        training = model.training
        model.eval()
        try:
            results = [(fn(model, batch), counts) for batch, counts in batches]
        finally:
            model.train(training)
        return [result for result, counts in results if counts]

    def full_params(self, model: nn.Module) -> Context:
        """A context in which the model has full weights on the first process, to export them."""
        return contextlib.nullcontext()

    def load_weights(
        self,
        model: nn.Module,
        optim: FinetuneOptimWrapper,
        weights: Mapping[str, torch.Tensor],
        *,
        partly: bool,
    ) -> str:
        """Load full weights into the model; see ``run_state.load_weights``."""
        return run_state.load_weights(unwrap_model(model), weights, partly=partly)

    def state_dict(
        self, model: nn.Module, optim: FinetuneOptimWrapper, save_optimizer: bool
    ) -> dict[str, Any]:
        """Weights and optimizer, as far as they go into one file."""
        state = {"state_dict": unwrap_model(model).state_dict()}
        if save_optimizer:
            state["optimizer"] = optim.state_dict()
        return state

    def save(
        self,
        path: Path,
        state: dict[str, Any],
        model: nn.Module,
        optim: FinetuneOptimWrapper,
        save_optimizer: bool,
    ) -> None:
        """Write a checkpoint; called on every rank.

        Args:
            path: ``iter_N.pth``.
            state: from ``run_state.collect``, with ``state_dict`` in it.
            model: the model.
            optim: the optimizer wrapper.
            save_optimizer: with the optimizer's state.
        """
        if get_rank() == 0:
            checkpoint.save_checkpoint(path, state)

    def restore(self, state: dict[str, Any], model: nn.Module, optim: FinetuneOptimWrapper) -> bool:
        """Put weights and optimizer back.

        Args:
            state: from ``checkpoint.load_checkpoint``.
            model: the model.
            optim: the optimizer wrapper.

        Returns:
            Whether the optimizer's state was there.

        Raises:
            UserError: when they are of another config, or written by another strategy.
        """
        self.require_own(state)
        run_state.load_weights(unwrap_model(model), state["state_dict"])
        if "optimizer" not in state:
            return False
        try:
            optim.load_state_dict(state["optimizer"])
        except (ValueError, KeyError) as error:
            what = tr("optimizer state")
            raise run_state.other_config(what, str(error)) from error
        return True

    def require_own(self, state: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of another strategy, whose files this one cannot read."""
        written_by = state["meta"].get("strategy", Strategy.name)
        if written_by != self.name:
            raise UserError(
                tr(
                    "the checkpoint was written by a run with {written_by}, this run "
                    "uses {name}: the optimizer cannot resume from it.",
                    written_by=_told(written_by),
                    name=_told(self.name),
                ),
                hint=tr(
                    "resume as it was trained, or begin anew from its weights: "
                    "--cfg-options load_from=CHECKPOINT"
                ),
            )


def _told(name: str) -> str:
    """A strategy as people ask for it."""
    return {"ddp": "plain processes (DDP)", "fsdp": "--fsdp"}.get(name, f"--deepspeed ({name})")
