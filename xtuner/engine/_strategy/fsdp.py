"""torch's FSDP2: weights, gradients and optimizer sharded over the ranks, layer by layer.

Each repeated layer is a unit: its weights are gathered before it computes, forward and backward,
and freed after. Embeddings, last norm and head are the root's and stay together for a step.
Gradients are reduced and sharded after every micro-batch, so no process holds all of them.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from mmengine.dist import get_rank, get_world_size
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from xtuner.checkpoint import run_state
from xtuner.checkpoint.folder import save_folder
from xtuner.checkpoint.sharded import DataReader
from xtuner.engine._strategy.strategy import Context, Strategy
from xtuner.engine.optim import FinetuneOptimWrapper
from xtuner.parallel.processes import init_single_process
from xtuner.utils.dtypes import torch_dtype
from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr

WEIGHTS, OPTIMIZER = "state_dict", "optimizer"


class FSDPStrategy(Strategy):
    """Trains with ``fully_shard``; checkpoints are folders of torch's distributed checkpoints.

    Args:
        dtype: in which weights are gathered and computed with; gradients are reduced in float32.
        cpu_offload: keep weights, gradients and optimizer in main memory; it steps there.
        reshard_after_forward: free a layer's gathered weights after its forward as well.
    """

    name = "fsdp"

    def __init__(
        self, dtype: str = "float32", cpu_offload: bool = False, reshard_after_forward: bool = True
    ) -> None:
        self.dtype = torch_dtype(dtype)
        self.cpu_offload = cpu_offload
        self.reshard_after_forward = reshard_after_forward
        if self.dtype is torch.float16:
            raise UserError(
                tr("--fsdp trains in bfloat16 or float32; float16 would need a loss scale."),
                hint="--cfg-options optim_wrapper.dtype=bfloat16",
            )

    def prepare(self) -> None:
        """Create a process group, also for a single process."""
        init_single_process()

    def wrap(self, model: nn.Module, device: torch.device, settings: Mapping[str, Any]) -> Any:
        """Shard the model: first each repeated layer, then what is left."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        packed = _packed_weights(model)
        for weight in packed:
            weight.data = weight.data.to(device)
        common: dict[str, Any] = {
            "mesh": init_device_mesh(device.type, (get_world_size(),)),
            "mp_policy": MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=torch.float32),
            "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda")
            if self.cpu_offload
            else OffloadPolicy(),
            "ignored_params": packed,
        }
        layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        for layer in layers:
            if any(weight not in packed for weight in layer.parameters()):
                fully_shard(layer, reshard_after_forward=self.reshard_after_forward, **common)
        fully_shard(model, reshard_after_forward=False, **common)
        if hasattr(model, "generate"):
            register_fsdp_forward_method(model, "generate")
        return model

    def setup(self, model: nn.Module, optim: FinetuneOptimWrapper) -> tuple[Any, Any]:
        """Refuse optimizers that do not work on sharded weights."""
        if type(optim.optimizer).__module__.startswith("bitsandbytes"):
            name = type(optim.optimizer).__name__
            raise UserError(
                tr("bitsandbytes' {name} does not work on weights sharded by FSDP.", name=name),
                hint=tr("take torch.optim.AdamW: FSDP shards its state over the ranks."),
            )
        return model, optim

    def micro_batch(self, model: nn.Module, *, last: bool) -> Context:
        """Nothing: gradients are sharded at once; accumulating full ones would take the memory."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def full_params(self, model: nn.Module) -> Iterator[None]:
        """Put full weights, in the main memory of the first process, into the model for a while."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        cut: list[tuple[nn.Module, str, Any]] = [
            (module, name, weight)
            for module in model.modules()
            for name, weight in module._parameters.items()
            if isinstance(weight, DTensor)
        ]
        made: dict[int, nn.Parameter] = {}  # tied weights stay tied
        try:
            for module, name, weight in cut:
                if id(weight) not in made:
                    full = weight.full_tensor().detach()
                    full = full.cpu() if get_rank() == 0 else torch.empty(0)
                    made[id(weight)] = nn.Parameter(full, requires_grad=weight.requires_grad)
                module._parameters[name] = made[id(weight)]
            yield
        finally:
            for module, name, weight in cut:
                module._parameters[name] = weight

    def load_weights(
        self,
        model: nn.Module,
        optim: FinetuneOptimWrapper,
        weights: Mapping[str, torch.Tensor],
        *,
        partly: bool,
    ) -> str:
        """Load this rank's shards of full weights."""
        targets = model.state_dict()
        cut = {name: _like(weight, targets.get(name)) for name, weight in weights.items()}
        return run_state.load_weights(model, cut, partly=partly)

    def state_dict(
        self, model: nn.Module, optim: FinetuneOptimWrapper, save_optimizer: bool
    ) -> dict[str, Any]:
        """The optimizer's settings; weights and state are written by all processes together."""
        if not save_optimizer:
            return {}
        return {"optimizer_groups": optim.optimizer.state_dict()["param_groups"]}

    def save(
        self,
        path: Path,
        state: dict[str, Any],
        model: nn.Module,
        optim: FinetuneOptimWrapper,
        save_optimizer: bool,
    ) -> None:
        """Write a folder, each rank its shards."""
        tensors: dict[str, Any] = {WEIGHTS: model.state_dict()}
        if save_optimizer:
            tensors[OPTIMIZER] = {
                f"{name}.{key}": value
                for name, entries in _entries(model, optim.optimizer)
                for key, value in entries.items()
            }

        def write(folder: Path) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                distributed_checkpoint.save(tensors, checkpoint_id=str(folder))

        save_folder(path, state, write)

    def restore(self, state: dict[str, Any], model: nn.Module, optim: FinetuneOptimWrapper) -> bool:
        """Read a folder, however many processes wrote it."""
        self.require_own(state)
        reader = DataReader(Path(state["folder"]))
        entries = reader.read_metadata().state_dict_metadata
        targets = {f"{WEIGHTS}.{name}": value for name, value in model.state_dict().items()}
        _require_same(targets, entries)
        numbers = {name: n for n, (name, _) in enumerate(_trained(model, optim.optimizer))}
        named = dict(_trained(model, optim.optimizer))
        states: dict[int, dict[str, torch.Tensor]] = {}
        if "optimizer_groups" in state:
            for key, entry in entries.items():
                name, _, kind = key.removeprefix(f"{OPTIMIZER}.").rpartition(".")
                of_optimizer = key.startswith(f"{OPTIMIZER}.") and name in named
                if not of_optimizer or not isinstance(entry, TensorStorageMetadata):
                    continue
                value = _empty(entry, named[name])
                states.setdefault(numbers[name], {})[kind] = targets[key] = value
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            distributed_checkpoint.load(targets, storage_reader=reader)
        model.load_state_dict(
            {k.removeprefix(f"{WEIGHTS}."): v for k, v in targets.items() if k.startswith(WEIGHTS)},
            strict=False,
        )
        if "optimizer_groups" not in state:
            return False
        optim.optimizer.load_state_dict(
            {"state": states, "param_groups": state["optimizer_groups"]}
        )
        return True


def _packed_weights(model: nn.Module) -> set[nn.Parameter]:
    """Quantised weights: they cannot be sharded, so each rank keeps all of them."""
    return {weight for weight in model.parameters() if not weight.is_floating_point()}


def _like(weight: torch.Tensor, target: object) -> torch.Tensor:
    """This rank's shard of a full weight, where the model's own is sharded."""
    if not isinstance(target, DTensor) or weight.shape != target.shape:
        return weight
    whole = weight.to(target.device, target.dtype)
    return distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.Tensor]]:
    """Names and parameters, in the optimizer's order."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    return [
        (names[id(weight)], weight)
        for group in optimizer.param_groups
        for weight in group["params"]
    ]


def _entries(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """The optimizer's state of each parameter that it has stepped."""
    for name, weight in _trained(model, optimizer):
        state = optimizer.state.get(weight, {})
        yield name, {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}


def _empty(entry: TensorStorageMetadata, weight: torch.Tensor) -> torch.Tensor:
    """The tensor to read optimizer state into: sharded as its weight, if of its shape."""
    if entry.size == weight.shape and weight.ndim:
        return torch.zeros_like(weight, dtype=entry.properties.dtype)
    return torch.empty(entry.size, dtype=entry.properties.dtype)


def _require_same(targets: Mapping[str, torch.Tensor], entries: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that lacks weights of this model, or has them in another shape."""
    lines = [
        tr("no weight {name}", name=name)
        if name not in entries
        else tr(
            "{name} is {size}, not {shape}",
            name=name,
            size=tuple(entries[name].size),
            shape=tuple(target.shape),
        )
        for name, target in targets.items()
        if name not in entries or entries[name].size != target.shape
    ]
    if lines:
        shown = "; ".join(lines[:4]) + ("; ..." if len(lines) > 4 else "")
        raise run_state.other_config(tr("weights"), shown)
