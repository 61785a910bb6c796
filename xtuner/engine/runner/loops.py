"""The training loop: micro-batches, gathered into optimizer steps whose loss is one mean.

A step reads its micro-batches, counts what their loss is divided by (over all of them and all
ranks), and only then computes. So how the work is cut into micro-batches and ranks does not show in
the gradients.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from mmengine.dist import get_world_size
from mmengine.runner.base_loop import BaseLoop

from xtuner.checkpoint.run_state import restore_random
from xtuner.engine.data_position import from_batch
from xtuner.engine.runner import loss_monitor
from xtuner.engine.runner.embeddings import lacks_embedding
from xtuner.engine.runner.loss_monitor import Action, LossMonitor
from xtuner.engine.runner.transfer import to_device
from xtuner.engine.runner.warmup import prepare_device
from xtuner.parallel.sequence.groups import (
    get_data_parallel_rank,
    get_sequence_parallel_world_size,
)
from xtuner.parallel.unwrap import unwrap_model
from xtuner.utils.cpu import HeapTrimmer
from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from xtuner.engine.runner.finetune_runner import FinetuneRunner


class TrainLoop(BaseLoop):
    """Train for a number of epochs (fractions too) or of micro-batches.

    Args:
        runner: the runner.
        dataloader: the training data, or its config.
        max_epochs: how often to go over the data; this or ``max_iters``.
        max_iters: how many micro-batches to take (not optimizer steps).
        val_begin: the first micro-batch after which to validate.
        val_interval: validate each so many micro-batches, at the end of the optimizer step.
        val_by_epoch: ``val_begin`` and ``val_interval`` count epochs instead.
        on_bad_loss: ``stop``, ``skip`` (leave the step out) or ``continue`` when the loss or the
            gradients are not finite.
        on_spike: the same for a loss that is far above the usual one.
    """

    def __init__(
        self,
        runner: FinetuneRunner,
        dataloader: DataLoader[Any] | dict[str, Any],
        max_epochs: float | None = None,
        max_iters: int | None = None,
        val_begin: int = 1,
        val_interval: int = 1000,
        val_by_epoch: bool = False,
        on_bad_loss: Action = "stop",
        on_spike: Action = "continue",
    ) -> None:
        super().__init__(runner, dataloader)
        _share_worker_seeds(self.dataloader)
        self.epoch_length = _length(self.dataloader)
        self.epochs_asked = max_epochs  # a fraction too; None where max_iters is given
        self._max_iters = iterations_of(max_epochs, max_iters, self.epoch_length)
        self._max_epochs = math.ceil(self._max_iters / (self.epoch_length or self._max_iters))
        self._epoch = 0
        self._iter = 0
        unit = self.epoch_length or 1 if val_by_epoch else 1
        self.val_begin = val_begin * unit
        self.val_interval = val_interval * unit
        self.stop_training = False
        self.step_finished = False
        self._step_began = time.perf_counter()
        self._validated = 0
        self._heap = HeapTrimmer()
        self.loss_monitor = LossMonitor(on_bad_loss, on_spike)

    @property
    def max_epochs(self) -> int:
        """Epochs to train, a begun one counted as whole."""
        return self._max_epochs

    @property
    def max_iters(self) -> int:
        """Micro-batches to train on, of each rank."""
        return self._max_iters

    @property
    def epoch(self) -> int:
        """Epochs that are done."""
        return self._epoch

    @property
    def iter(self) -> int:
        """Micro-batches that are done."""
        return self._iter

    @property
    def accumulative_counts(self) -> int:
        """Micro-batches of one optimizer step."""
        return self.runner.optim_wrapper.accumulative_counts

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the whole run, a last short one counted."""
        return math.ceil(self._max_iters / self.accumulative_counts)

    def run(self) -> torch.nn.Module:
        """Train to the end, or until a hook sets ``stop_training``; return the model."""
        runner = self.runner
        runner.readiness = prepare_device(runner)
        runner.call_hook("show_plan")
        runner.call_hook("before_train")
        restore_random(runner)
        self._validated = self._iter
        runner.model.train()
        micro_batches = self._micro_batches()
        if not self._at_epoch_boundary():  # resumed within an epoch, which begins for the hooks
            runner.call_hook("before_train_epoch")
        while self._iter < self._max_iters and not self.stop_training:
            self._step_began = time.perf_counter()
            wanted = min(self.accumulative_counts, self._max_iters - self._iter)
            batches = list(itertools.islice(micro_batches, wanted))
            if not batches:
                break
            self.run_iter(batches)
            self._validate_if_due()
        runner.call_hook("after_train")
        return runner.model

    def run_iter(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Take one optimizer step.

        Args:
            batches: its micro-batches, on the CPU.
        """
        runner, model = self.runner, self.runner.model
        num_items_in_batch, tokens = self._totals(batches)
        shares: list[dict[str, torch.Tensor]] = []
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            self.step_finished = last
            self._begin_iteration(batch)
            with runner.strategy.micro_batch(model, last=last):
                with runner.optim_wrapper.optim_context(model):
                    outputs = model(
                        **batch_for_loss(runner, batch),
                        mode="loss",
                        num_items_in_batch=num_items_in_batch,
                    )
                # Every strategy averages over the ranks; we want the sum.
                runner.optim_wrapper.backward(outputs["loss"] * get_world_size())
            shares.append({name: value.detach().float() for name, value in outputs.items()})
            logged = self._finish_step(batches, shares, tokens) if last else {}
            self._end_iteration(batch, logged)

    def _finish_step(
        self,
        batches: Sequence[Mapping[str, Any]],
        shares: list[dict[str, torch.Tensor]],
        tokens: int,
    ) -> dict[str, Any]:
        """Clip, check the loss, step; return what is logged for the whole step.

        ``step_time`` has reading the data in it, but not what hooks do after the step.
        """
        optim = self.runner.optim_wrapper
        logged, grad_norm = _read(shares, optim.clip())
        bad = self.loss_monitor.check(logged["loss"], grad_norm, scaled=optim.scaler is not None)
        if bad is not None:
            losses = [float(share["loss"]) for share in shares]
            traced = [self.runner.trace(batch) for batch in batches]
            loss_monitor.report(
                *bad,
                rows=loss_monitor.rows_of_step(traced, losses),
                iteration=self._iter + 1,
                work_dir=self.runner.work_dir,
                warn=self.runner.logger.warning,
            )
        if bad is not None and bad[1] == "skip":
            optim.skip_step()
        else:
            optim.step()
            optim.zero_grad()
        if self.runner.device.type == "cpu":
            self._heap.after_step(time.perf_counter())
        seconds = time.perf_counter() - self._step_began
        return {**logged, "grad_norm": grad_norm, "tokens": tokens, "step_time": seconds}

    def _begin_iteration(self, batch: Mapping[str, Any]) -> None:
        if self._at_epoch_boundary():
            self.runner.call_hook("before_train_epoch")
        self.runner.call_hook("before_train_iter", batch_idx=self._iter, data_batch=batch)

    def _end_iteration(self, batch: Mapping[str, Any], logged: dict[str, Any]) -> None:
        self.runner.call_hook(
            "after_train_iter", batch_idx=self._iter, data_batch=batch, outputs=logged
        )
        self._iter += 1
        if self._at_epoch_boundary() or self._iter == self._max_iters:
            self.runner.call_hook("after_train_epoch")
            self._epoch += 1

    def _at_epoch_boundary(self) -> bool:
        if self.epoch_length is None:
            return self._iter == 0
        return self._iter % self.epoch_length == 0

    def _micro_batches(self) -> Iterator[Mapping[str, Any]]:
        """All micro-batches of the run from where it is, epoch after epoch without a pause."""
        epoch, done = divmod(self._iter, self.epoch_length or self._max_iters)
        while True:
            _set_epoch(self.dataloader, epoch)
            empty = True
            for batch in from_batch(self.dataloader, done):
                empty = False
                yield batch
            if empty and done == 0:
                return
            epoch, done = epoch + 1, 0

    def _totals(self, batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, int], int]:
        """What the step's loss is divided by, and its input tokens, over all groups of ranks."""
        model: Any = unwrap_model(self.runner.model)
        counts: dict[str, int] = {}
        for batch in batches:
            for name, count in model.num_items(batch["data"]).items():
                counts[name] = counts.get(name, 0) + int(count)
        names = sorted(counts)
        numbers = [*(counts[name] for name in names), sum(map(count_tokens, batches))]
        # Ranks that share rows have all counted the same.
        size = get_sequence_parallel_world_size()
        *added, tokens = (n / size for n in add_over_ranks(numbers, self.runner.device))
        return {name: int(n) for name, n in zip(names, added, strict=True)}, int(tokens)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to check its losses as this one would."""
        return {"recent_losses": list(self.loss_monitor.recent)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` gave."""
        self.loss_monitor.recent.extend(state["recent_losses"])

    def validation_follows(self) -> bool:
        """Whether a validation is due right after the micro-batch that is being worked on."""
        return self._validation_is_due(self._iter + 1)

    def _validate_if_due(self) -> None:
        if self._validation_is_due(self._iter):
            self._validated = self._iter
            self.runner.val_loop.run()
            self.runner.model.train()

    def _validation_is_due(self, done: int) -> bool:
        if self.runner.val_loop is None or done < self.val_begin or done == self._validated:
            return False
        crossed = done // self.val_interval > self._validated // self.val_interval
        return crossed or done == self._max_iters


def iterations_of(max_epochs: float | None, max_iters: int | None, epoch_length: int | None) -> int:
    """Micro-batches of a run.

    Args:
        max_epochs: how often to go over the data, fractions too.
        max_iters: how many micro-batches; one of the two is given.
        epoch_length: micro-batches of an epoch; None for a stream.

    Raises:
        UserError: when it is not exactly one of the two, or comes to nothing.
    """
    if (max_epochs is None) == (max_iters is None):
        raise UserError(
            tr(
                "train_cfg needs max_epochs or max_iters, one of them; it has "
                "max_epochs={max_epochs} and max_iters={max_iters}.",
                max_epochs=max_epochs,
                max_iters=max_iters,
            )
        )
    if max_iters is not None:
        wanted = int(max_iters)
    elif epoch_length is None:
        raise UserError(
            tr("the data has no length (it is a stream), so max_epochs has no meaning."),
            hint="train_cfg = dict(type=TrainLoop, max_iters=...)",
        )
    else:
        wanted = math.ceil(float(max_epochs or 0) * epoch_length - 1e-6)
    if wanted < 1:
        raise UserError(
            tr(
                "there is nothing to train on: {epoch_length} micro-batches in an epoch, "
                "max_epochs={max_epochs}, max_iters={max_iters}.",
                epoch_length=epoch_length,
                max_epochs=max_epochs,
                max_iters=max_iters,
            )
        )
    return wanted


def batch_for_loss(runner: FinetuneRunner, batch: Mapping[str, Any]) -> Any:
    """Copy a batch to where the model computes its loss, in the form that suits the device.

    Raises:
        UserError: as ``batch_on_device``.
    """
    prepare = getattr(unwrap_model(runner.model), "prepare_batch", None)
    if prepare is not None:
        batch = {**batch, "data": prepare(batch["data"], runner.device)}
    return batch_on_device(runner, batch)


def batch_on_device(runner: FinetuneRunner, batch: Mapping[str, Any]) -> Any:
    """Copy a batch to where the model computes.

    Raises:
        UserError: for a token id that the model has no embedding for, with its row. The embedding
            would fail with an IndexError on a CPU, and with an assertion of the device on a GPU.
    """
    llm = getattr(unwrap_model(runner.model), "causal_lm", None)
    ids = batch["data"].get("input_ids")
    if llm is not None and isinstance(ids, torch.Tensor) and ids.numel():
        vocab_size = llm.config.get_text_config().vocab_size
        largest = int(ids.max())
        if largest >= vocab_size:
            raise lacks_embedding(largest, vocab_size, runner.trace(batch))
    return to_device(batch, runner.device)


def count_tokens(batch: Mapping[str, Any]) -> int:
    """Input tokens of a batch, padding left out; 0 when it has no text."""
    data = batch["data"]
    mask, ids = data.get("attention_mask"), data.get("input_ids")
    if isinstance(mask, torch.Tensor):
        return int((mask != 0).sum())
    return ids.numel() if isinstance(ids, torch.Tensor) else 0


def add_over_ranks(numbers: Sequence[float], device: torch.device) -> list[float]:
    """Add each number over all ranks, in double precision where the device has it."""
    if get_world_size() == 1:
        return list(numbers)
    added = torch.tensor(numbers, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(added)
    return added.tolist()


def _read(
    shares: list[dict[str, torch.Tensor]], grad_norm: torch.Tensor
) -> tuple[dict[str, float], float]:
    """The step's loss and further scalars, and the norm of its gradients, read at once.

    Shares of one mean add up over micro-batches and ranks; the norm is that of all.
    """
    names = sorted(shares[0])
    added = torch.stack([sum(share[name] for share in shares) for name in names])  # type: ignore
    if get_world_size() > 1:
        torch.distributed.all_reduce(added)
    norm = grad_norm.detach().to(added.device, torch.float32, non_blocking=True)
    *values, last = torch.cat([added, norm.reshape(1)]).tolist()
    return dict(zip(names, values, strict=True)), last


def _length(dataloader: DataLoader[Any]) -> int | None:
    try:
        return len(dataloader)
    except TypeError:
        return None


def _share_worker_seeds(dataloader: DataLoader[Any]) -> None:
    """Let the loaders of processes that share rows draw the same random numbers for them."""
    start: Any = getattr(dataloader, "worker_init_fn", None)
    if get_sequence_parallel_world_size() > 1 and "rank" in getattr(start, "keywords", {}):
        dataloader.worker_init_fn = functools.partial(start, rank=get_data_parallel_rank())


def _set_epoch(dataloader: DataLoader[Any], epoch: int) -> None:
    """Tell the samplers which epoch it is, so that each has an order of its own."""
    inner = getattr(dataloader.batch_sampler, "sampler", None)
    for sampler in (dataloader.sampler, dataloader.batch_sampler, inner):
        set_epoch = getattr(sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
