"""The whole state of a training run: collected for a checkpoint, and restored to resume.

``collect`` and ``restore`` are what the runner's ``save_checkpoint`` and ``resume`` consist of.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from mmengine.dist import all_gather_object, get_rank, get_world_size

from xtuner.checkpoint.hyper_parameters import Position, Restored, initial_groups
from xtuner.checkpoint.rng import random_state, set_random_state
from xtuner.checkpoint.serialize import mmengine_hub, to_serializable
from xtuner.utils.errors import UserError
from xtuner.utils.lang import N_, tr, translate
from xtuner.version import __version__

if TYPE_CHECKING:
    from xtuner.utils.types import Runner


def collect(
    runner: Runner,
    *,
    save_optimizer: bool = True,
    save_param_scheduler: bool = True,
    meta: Mapping[str, Any] | None = None,
    by_epoch: bool = False,
) -> dict[str, Any]:
    """Collect a run's state; to be called on every rank, as the random states of all are saved.

    Args:
        runner: an mmengine runner whose model, optimizer and loop are built.
        save_optimizer: with the optimizer and the gradient scaler.
        save_param_scheduler: with the learning-rate schedules.
        meta: ``iter`` (micro-batches done) and ``epoch``; as mmengine derives them when None.
        by_epoch: only for that derivation: called after an epoch, not after an iteration.

    Returns:
        ``meta, message_hub, random_states, data_position, loop``, as asked ``param_schedulers``,
        and, unless the strategy writes them by itself, ``state_dict`` and ``optimizer``.
    """
    described = _progress(runner, by_epoch) | dict(meta or {})
    described |= {
        "cfg": runner.cfg.pretty_text,
        "seed": runner.seed,
        "experiment_name": runner.experiment_name,
        "time": time.strftime("%Y%m%d_%H%M%S"),
        "xtuner_version": __version__,
        "world_size": get_world_size(),
        "strategy": runner.strategy.name,
        "fingerprints": getattr(runner, "fingerprints", {}),
    }
    state: dict[str, Any] = {
        "meta": described,
        **runner.strategy.state_dict(runner.model, runner.optim_wrapper, save_optimizer),
        "message_hub": _plain_hub(runner.message_hub.state_dict()),
        "random_states": all_gather_object(random_state()),
        "data_position": _data_position(runner, described["iter"]),
        "loop": runner.train_loop.state_dict(),
    }
    if save_optimizer:
        state["hyper_parameters"] = runner.initial_groups or initial_groups(runner.optim_wrapper)
    if save_param_scheduler and runner.param_schedulers is not None:
        state["param_schedulers"] = [each.state_dict() for each in runner.param_schedulers]
    runner.call_hook("before_save_checkpoint", checkpoint=state)
    return state


def restore(runner: Runner, state: dict[str, Any]) -> None:
    """Restore a checkpoint's state into a run that is built but has not started.

    The random states are kept until ``restore_random``, as what happens before the first step
    (a chat at the start of the training, for example) may draw numbers.

    Args:
        runner: the mmengine runner.
        state: from ``load_checkpoint``, of this version or of XTuner v0.1.

    Raises:
        UserError: when the weights or the optimizer are not those of this config.
    """
    runner.call_hook("after_load_checkpoint", checkpoint=state)
    scale = _scale(runner, state)
    done = round(state["meta"]["iter"] * scale)
    length = runner.train_loop.epoch_length
    hyper_parameters = Restored(runner.optim_wrapper, runner.param_schedulers or [])
    has_optimizer = runner.strategy.restore(state, runner.model, runner.optim_wrapper)
    if not has_optimizer:
        runner.logger.warning(
            tr("the checkpoint has no optimizer state (save_optimizer=False): it starts anew.")
        )
    position = Position(
        done,
        length,
        moved=scale != 1,
        accumulative_counts=runner.train_loop.accumulative_counts,
    )
    hyper_parameters.apply(state, position, has_optimizer=has_optimizer)
    runner.message_hub.load_state_dict(mmengine_hub(state.get("message_hub", {})))
    if "loop" in state:
        runner.train_loop.load_state_dict(state["loop"])
    runner.train_loop._iter = done
    runner.train_loop._epoch = done // (length or done + 1)
    runner.saved_random_states = state.get("random_states")
    _restore_seed(runner, state["meta"].get("seed"))


def _restore_seed(runner: Any, seed: int | None) -> None:
    """Draw the order of the rows from the seed of the interrupted run.

    A config without a seed gets another one at each start; rows would be read twice, or never.
    """
    if seed is None or runner._randomness_cfg.get("seed") is not None:
        return
    runner._seed = seed
    loader = runner.train_loop.dataloader
    batches = getattr(loader, "batch_sampler", None)
    for sampler in (getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)):
        if sampler is not None and getattr(sampler, "seed", None) is not None:
            sampler.seed = seed
    start = getattr(loader, "worker_init_fn", None)
    if start is not None and "seed" in getattr(start, "keywords", {}):
        loader.worker_init_fn = functools.partial(start, seed=seed)


def restore_random(runner: Runner) -> None:
    """Give this rank the random state it had; to be called right before the first step.

    Does nothing when the run is not a resumed one, or the checkpoint (one of XTuner v0.1, or from
    fewer processes) has no state for this rank.
    """
    saved = getattr(runner, "saved_random_states", None)
    if saved is not None and get_rank() < len(saved):
        set_random_state(saved[get_rank()])
    runner.saved_random_states = None


def load_weights(
    model: torch.nn.Module, weights: Mapping[str, torch.Tensor], *, partly: bool = False
) -> str:
    """Load saved weights into a model and see that every trained one has got its value.

    Args:
        model: not wrapped.
        weights: name -> tensor.
        partly: let names be missing or left over, as long as some fit (``load_from``).

    Returns:
        A description of what did not fit; empty when all did.

    Raises:
        UserError: when names or shapes are not those of the model.
    """
    try:
        outcome = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise other_config(tr("weights"), str(error)) from error
    expected = set(model.state_dict())
    missing = [name for name in outcome.missing_keys if name in expected]
    lines = [
        translate(message, count=len(names), name=names[0])
        for names, message in (
            (missing, N_("{count} are missing, such as {name}")),
            (outcome.unexpected_keys, N_("{count} are not in the model, such as {name}")),
        )
        if names
    ]
    nothing_fits = len(outcome.unexpected_keys) == len(weights)
    if lines and (nothing_fits or not partly):
        raise other_config(tr("weights"), "; ".join(lines))
    return "; ".join(lines)


def _progress(runner: Runner, by_epoch: bool) -> dict[str, int]:
    """What is done, seen from a hook after an epoch or an iteration (not yet counted then)."""
    if by_epoch:
        return {"epoch": runner.epoch + 1, "iter": runner.iter}
    return {"epoch": runner.epoch, "iter": runner.iter + 1}


def _data_position(runner: Runner, iterations: int) -> dict[str, int | None]:
    """Epochs and micro-batches of the next one that are done."""
    try:
        per_epoch = len(runner.train_dataloader)
    except TypeError:  # a stream
        return {"epoch": 0, "batches": iterations, "batches_per_epoch": None}
    epoch, batches = divmod(iterations, per_epoch)
    return {"epoch": epoch, "batches": batches, "batches_per_epoch": per_epoch}


def _scale(runner: Runner, state: Mapping[str, Any]) -> float:
    """Micro-batches of an epoch now, for each one of then.

    Not 1 when the data or the number of processes changed (and that was allowed): the run continues
    after the same share of its epochs.
    """
    before = state.get("data_position", {}).get("batches_per_epoch")
    now = runner.train_loop.epoch_length
    return now / before if before and now else 1.0


def _plain_hub(hub: Mapping[str, Any]) -> dict[str, Any]:
    """The message hub's state, less what hooks have put there that is not data."""
    plain: dict[str, dict[str, Any]] = {"log_scalars": {}, "runtime_info": {}}
    for part, kept in plain.items():
        for name, value in hub[part].items():
            try:
                kept[name] = to_serializable(value)
            except TypeError:
                continue
    names = plain["log_scalars"].keys() | plain["runtime_info"].keys()
    plain["resumed_keys"] = {key: hub["resumed_keys"][key] for key in sorted(names)}
    return plain


def other_config(what: str, detail: str) -> UserError:
    """The error for a checkpoint whose weights or optimizer do not fit."""
    return UserError(
        tr(
            "the checkpoint's {what} do not belong to this config: {detail}",
            what=what,
            detail=detail,
        ),
        hint=tr("resume with the config that lies beside the checkpoint."),
    )
