"""DeepSpeed's ZeRO: optimizer, gradients and, in stage 3, weights sharded over the ranks."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from mmengine.registry import MODEL_WRAPPERS
from torch import nn

from xtuner.checkpoint import run_state
from xtuner.checkpoint.folder import save_folder
from xtuner.engine._strategy.strategy import Context, Strategy
from xtuner.engine.optim import FinetuneOptimWrapper
from xtuner.parallel.processes import init_single_process
from xtuner.parallel.unwrap import unwrap_model
from xtuner.utils.errors import UserError, Where, require
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

# All that DeepSpeed's files hold beside plain data and tensors; loading them runs nothing else.
IN_ITS_FILES = {
    "deepspeed.runtime.fp16.loss_scaler": ("LossScaler", "DynamicLossScaler"),
    "deepspeed.runtime.zero.config": ("ZeroStageEnum",),
    "deepspeed.utils.tensor_fragment": ("fragment_address",),
}


def _saves_frozen(model: nn.Module) -> bool:
    """Whether a model's own state dict has weights that are not trained."""
    saved = model.state_dict().keys()
    return any(
        not weight.requires_grad and name in saved for name, weight in model.named_parameters()
    )


class DeepSpeedStrategy(Strategy):
    """Trains with ``deepspeed.initialize``; checkpoints are DeepSpeed's folders.

    Args:
        config: DeepSpeed's settings without ``auto`` (``engine.adapt_strategy`` fills them in).
        exclude_frozen_parameters: leave weights that are not trained out of checkpoints, unless the
            model's own state dict has them: a model of which a part is frozen is saved whole.
    """

    def __init__(self, config: Mapping[str, Any], exclude_frozen_parameters: bool = True) -> None:
        require("deepspeed", extra="deepspeed", purpose="--deepspeed")
        self.config = _plain(config)
        self.stage = int(self.config.get("zero_optimization", {}).get("stage", 0))
        self.name = f"ZeRO-{self.stage}"
        self.exclude_frozen_parameters = exclude_frozen_parameters
        self._shards_while_loading: Any = None

    def prepare(self) -> None:
        """In stage 3 let transformers shard each weight as it is loaded."""
        logging.getLogger("DeepSpeed").setLevel(os.environ.get("DEEPSPEED_LOG_LEVEL", "WARNING"))
        init_single_process()
        import deepspeed
        from transformers.integrations.deepspeed import (
            HfDeepSpeedConfig,
            unset_hf_deepspeed_config,
        )

        # On a CPU it would compile code to exchange numbers in shared memory, and wait for ever
        # where a compilation was once broken off. gloo does that as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        unset_hf_deepspeed_config()
        if self.stage == 3:
            # transformers looks at it for as long as this object lives.
            self._shards_while_loading = HfDeepSpeedConfig(self.config)

    def wrap(self, model: nn.Module, device: torch.device, settings: Mapping[str, Any]) -> Any:
        """Nothing yet: DeepSpeed takes the model together with the optimizer."""
        return model

    def setup(self, model: DeepSpeedEngine, optim: FinetuneOptimWrapper) -> tuple[Any, Any]:
        """Hand model and optimizer to DeepSpeed."""
        import deepspeed

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine, *_ = deepspeed.initialize(
                model=model, optimizer=optim.optimizer, config=self.config
            )
        engine.checkpoint_engine = _data_only_reader(engine.checkpoint_engine)
        if type(engine) not in MODEL_WRAPPERS.module_dict.values():
            MODEL_WRAPPERS.register_module(module=type(engine))
        return engine, DeepSpeedOptim(engine, optim)

    def micro_batch(self, model: DeepSpeedEngine, *, last: bool) -> Context:
        """Tell DeepSpeed which micro-batch ends the optimizer step."""
        model.set_gradient_accumulation_boundary(last)
        return contextlib.nullcontext()

    def full_params(self, model: DeepSpeedEngine) -> Context:
        """In stage 3 gather all weights on every rank, which takes as much memory as the model."""
        if self.stage < 3:
            return contextlib.nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(model.parameters()))

    def load_weights(
        self,
        model: DeepSpeedEngine,
        optim: FinetuneOptimWrapper,
        weights: Mapping[str, torch.Tensor],
        *,
        partly: bool,
    ) -> str:
        """Load full weights into the model, and fp32 copies of them into the optimizer."""
        import deepspeed

        inner = unwrap_model(model)
        gathered = (
            deepspeed.zero.GatheredParameters(list(inner.parameters()), modifier_rank=0)
            if self.stage == 3
            else contextlib.nullcontext()
        )
        with gathered:
            misfits = run_state.load_weights(inner, weights, partly=partly)
        model.optimizer.refresh_fp32_params()
        return misfits

    def state_dict(
        self, model: DeepSpeedEngine, optim: FinetuneOptimWrapper, save_optimizer: bool
    ) -> dict[str, Any]:
        """Nothing: DeepSpeed writes weights and optimizer itself."""
        return {}

    def save(
        self,
        path: Path,
        state: dict[str, Any],
        model: DeepSpeedEngine,
        optim: FinetuneOptimWrapper,
        save_optimizer: bool,
    ) -> None:
        """Write DeepSpeed's folder.

        The fp32 weights are part of its optimizer states, so these are always written.
        """
        exclude = self.exclude_frozen_parameters and not _saves_frozen(model.module)

        def write(folder: Path) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.save_checkpoint(
                    str(folder.parent),
                    tag=folder.name,
                    save_latest=False,
                    exclude_frozen_parameters=exclude,
                )

        save_folder(path, state, write)

    def restore(
        self, state: dict[str, Any], model: DeepSpeedEngine, optim: FinetuneOptimWrapper
    ) -> bool:
        """Let DeepSpeed read its folder, by as many processes as wrote it."""
        self.require_own(state)
        before, now = state["meta"]["world_size"], torch.distributed.get_world_size()
        folder = Path(state["folder"])
        if before != now:
            raise UserError(
                tr(
                    "ZeRO's parts of {before} processes cannot be put together by {now}.",
                    before=before,
                    now=now,
                ),
                hint=tr(
                    "resume with {before} processes; or begin anew from the weights: "
                    "--cfg-options load_from={folder}. --fsdp resumes with any number.",
                    before=before,
                    folder=folder,
                ),
                where=Where(str(folder)),
            )
        model.load_checkpoint(
            str(folder.parent),
            tag=folder.name,
            load_module_strict=False,
            load_lr_scheduler_states=False,
        )
        return True


class DeepSpeedOptim(FinetuneOptimWrapper):
    """The loop's view of an engine that scales, clips and steps by itself.

    Args:
        engine: from ``deepspeed.initialize``.
        optim: the wrapper of the optimizer that the engine took up; its clipping is in the
            engine's settings.
    """

    def __init__(self, engine: DeepSpeedEngine, optim: FinetuneOptimWrapper) -> None:
        super().__init__(optim.optimizer, optim.accumulative_counts)
        self.engine = engine
        self.dtype = next(
            (
                dtype
                for enabled, dtype in (
                    (engine.fp16_enabled(), torch.float16),
                    (engine.bfloat16_enabled(), torch.bfloat16),
                )
                if enabled
            ),
            torch.float32,
        )
        self.scaler = engine.optimizer.loss_scaler if engine.fp16_enabled() else None

    @contextlib.contextmanager
    def optim_context(self, model: nn.Module) -> Any:
        """Nothing: the weights are in the dtype of the training."""
        yield

    def backward(self, loss: torch.Tensor, **kwargs: object) -> None:
        """Let the engine compute the gradients; the loss is already this micro-batch's share."""
        self.engine.backward(loss, scale_wrt_gas=False, **kwargs)
        self._inner_count += 1

    def clip(self) -> torch.Tensor:
        """Step as well, as the engine clips while it steps; return the norm before clipping.

        The engine itself leaves out an fp16 step that overflowed. In other dtypes it has
        stepped whatever the gradients were, so ``adapt_strategy`` refuses to skip bad steps.
        """
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return torch.as_tensor(0.0 if norm is None else norm, dtype=torch.float32)

    def step(self, **kwargs: object) -> None:
        """Nothing: ``clip`` has stepped."""

    def zero_grad(self, **kwargs: object) -> None:
        """Nothing: the engine has done so."""

    def skip_step(self) -> None:
        """Nothing: only an fp16 step that overflowed comes here, and the engine left it out."""

    def state_dict(self) -> dict[str, Any]:
        """Refused: each rank has a part only."""
        raise NotImplementedError("the engine saves the optimizer")


def _data_only_reader(writer: object) -> Any:
    """DeepSpeed's own way to write files, and ours to read them: as data."""

    class DataOnly(type(writer)):  # type: ignore[misc]
        """Reads with ``weights_only``; DeepSpeed itself would run what a file asks for."""

        def load(self, path: str, map_location: str | torch.device | None = None) -> Any:
            """Load a file of DeepSpeed's."""
            import importlib

            known = [
                getattr(importlib.import_module(module), name)
                for module, names in IN_ITS_FILES.items()
                for name in names
            ]
            try:
                with torch.serialization.safe_globals(known):
                    return torch.load(path, map_location=map_location, weights_only=True)
            except pickle.UnpicklingError as error:
                raise UserError(
                    tr(
                        "this file holds more than data, nothing from it was run: {error}",
                        error=error,
                    ),
                    where=Where(path),
                ) from error

    writer.__class__ = DataOnly
    return writer


def _plain(value: object) -> Any:
    """A config's dicts as Python's own, which DeepSpeed insists on."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
