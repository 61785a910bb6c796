"""What makes a run quick on its machine, done once its length is known and before it starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from xtuner.model.backends.cpu.kernels import Kernel, compile_kernels
from xtuner.parallel.unwrap import unwrap_model
from xtuner.reporting.summary import count_parameters, lengths
from xtuner.utils.cpu import keep_freed_memory
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from xtuner.engine.runner.finetune_runner import FinetuneRunner

WORTH_COMPILING = 3e14
"""Floating-point operations of a run that compiling saves more time than it takes: on a CPU that
does 1e12 a second, of five minutes it saves half a minute and takes ten seconds."""


def prepare_device(runner: FinetuneRunner) -> list[str]:
    """Prepare this process for the training, on a CPU; a GPU needs nothing.

    Returns:
        What was done, in words.
    """
    if runner.device.type != "cpu":
        return []
    threads = torch.get_num_threads()
    done = [tr("1 thread") if threads == 1 else tr("{threads} threads", threads=threads)]
    if keep_freed_memory():
        done.append(tr("freed memory is kept"))
    Kernel.compiled = False  # another run of this process may have set it
    if _compiles(runner):
        compile_kernels()
        done.append(tr("compiled"))
    return done


def _compiles(runner: FinetuneRunner) -> bool:
    """Whether to compile: as the model says; with ``auto``, if the run is long enough.

    How long it takes is not looked at, but how much there is to compute, so that the same run is
    always computed in the same way.
    """
    wanted = getattr(unwrap_model(runner.model), "compiles", False)
    if wanted != "auto":
        return bool(wanted)
    loop = runner.train_loop
    rows = list(lengths(loop.dataloader.dataset))
    if not rows:
        return False
    tokens = sum(rows) / len(rows) * (loop.dataloader.batch_size or 1) * loop.max_iters
    _, parameters = count_parameters(unwrap_model(runner.model))
    return 6 * parameters * tokens >= WORTH_COMPILING
