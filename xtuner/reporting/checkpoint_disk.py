"""How large a run's checkpoints are, how many exist at once, and whether the disk has room."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmengine.hooks import CheckpointHook

from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from xtuner.utils.types import Runner

GIB = 2**30


@dataclass(frozen=True)
class CheckpointDisk:
    """Bytes of a checkpoint (about), how many exist at once, and free bytes of their disk."""

    size: float
    count: int
    free: int

    @property
    def is_enough(self) -> bool:
        return self.size * self.count <= self.free

    def __str__(self) -> str:
        return tr(
            "about {size} each, {count} at once; {free} free",
            size=_size(self.size),
            count=self.count,
            free=_size(self.free),
        )


def _size(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"


def checkpoint_disk(runner: Runner, trained: int) -> CheckpointDisk | None:
    """What the run's checkpoints need.

    Args:
        runner: whose model, optimizer and loop are built.
        trained: parameters that are trained, of the whole model.

    Returns:
        None for a run that writes none.
    """
    hook = next((hook for hook in runner.hooks if isinstance(hook, CheckpointHook)), None)
    if hook is None or (hook.interval <= 0 and not hook.save_last):
        return None
    sizes = [p.element_size() for p in runner.model.parameters() if p.requires_grad]
    groups = getattr(runner.optim_wrapper, "param_groups", None) or [{}]
    states = (2 if "betas" in groups[0] else 1) if hook.save_optimizer else 0
    size = trained * max(sizes, default=4) * (1 + states)
    loop = runner.train_loop
    length = loop.max_epochs if hook.by_epoch else loop.max_iters
    total = max(1, math.ceil(length / hook.interval)) if hook.interval > 0 else 1
    count = min(total, hook.max_keep_ckpts + 1) if hook.max_keep_ckpts > 0 else total
    place = Path(hook.out_dir or runner.work_dir)
    while not place.exists():
        place = place.parent
    return CheckpointDisk(size, count, shutil.disk_usage(place).free)
