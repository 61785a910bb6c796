"""The plain strategy, a whole copy of the model in each process, and what any strategy answers.

The runner asks its strategy, in this order: ``prepare`` (nothing is built), ``wrap`` (the model is
built), ``bind`` (the optimizer is built), then for each micro-batch ``micro_batch``, for
checkpoints ``parts``, ``save``, ``restore`` and ``load_weights``, and for exports ``whole``.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import get_rank, get_world_size
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from xtuner.checkpoint import checkpoint, run_state
from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr

Context = contextlib.AbstractContextManager[None]


class Strategy:
    """One process, or several with ``DistributedDataParallel``; checkpoints are single files."""

    name = "ddp"

    def __str__(self) -> str:
        """What people are told of it."""
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

    def bind(self, model: Any, optim: Any) -> tuple[Any, Any]:
        """Take up the optimizer; give the model and the optimizer wrapper to go on with."""
        return model, optim

    def micro_batch(self, model: Any, *, last: bool) -> Context:
        """The context of forward and backward of a micro-batch.

        Args:
            model: from ``wrap`` or ``bind``.
            last: of its optimizer step; before it gradients need not be exchanged.
        """
        if last or not isinstance(model, DistributedDataParallel):
            return contextlib.nullcontext()
        return model.no_sync()

    def whole(self, model: Any) -> Context:
        """A context in which the first process finds whole weights in the model, to export them."""
        return contextlib.nullcontext()

    def load_weights(
        self, model: Any, optim: Any, weights: Mapping[str, torch.Tensor], *, partly: bool
    ) -> str:
        """Give the model whole weights; see ``run_state.load_weights``."""
        return run_state.load_weights(run_state.bare(model), weights, partly=partly)

    def parts(self, model: Any, optim: Any, save_optimizer: bool) -> dict[str, Any]:
        """Weights and optimizer, as far as they go into one file."""
        parts = {"state_dict": run_state.bare(model).state_dict()}
        if save_optimizer:
            parts["optimizer"] = optim.state_dict()
        return parts

    def save(
        self, path: Path, state: dict[str, Any], model: Any, optim: Any, save_optimizer: bool
    ) -> None:
        """Write a checkpoint; called on every rank.

        Args:
            path: ``iter_N.pth``.
            state: from ``run_state.collect``, with ``parts`` in it.
            model: the model.
            optim: the optimizer wrapper.
            save_optimizer: with the optimizer's state.
        """
        if get_rank() == 0:
            checkpoint.save_checkpoint(path, state)

    def restore(self, state: dict[str, Any], model: Any, optim: Any) -> bool:
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
        run_state.load_weights(run_state.bare(model), state["state_dict"])
        if "optimizer" not in state:
            return False
        try:
            optim.load_state_dict(state["optimizer"])
        except (ValueError, KeyError) as error:
            what = tr("optimizer state")
            raise run_state.other_config(what, str(error)) from error
        return True

    def require_own(self, state: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of another strategy, whose parts this one cannot put together."""
        written_by = state["meta"].get("strategy", Strategy.name)
        if written_by != self.name:
            raise UserError(
                tr(
                    "the checkpoint was written by a run with {written_by}, this run "
                    "uses {name}: the optimizer cannot go on from it.",
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
