"""The plan of a run beside what its GPU has free, before the weights are read."""

from __future__ import annotations

import logging
import os

import torch
from mmengine.config import Config

from xtuner.parallel.launch_env import LAUNCHER_ENV
from xtuner.utils.lang import tr

GIB = 2**30
logger = logging.getLogger(__name__)


def memory_warning(config: Config) -> str | None:
    """What to say where a run will likely need more memory than this process's GPU has free.

    To be called by one process, before there is a process group: a copy of the model is built
    without weights, and DeepSpeed would have it sharded by all.

    Args:
        config: adapted to this machine and its strategy.

    Returns:
        A warning; None where the run fits, no plan can be made of its model, or there is no GPU.
    """
    if not torch.cuda.is_available():
        return None
    from xtuner.planning.plan import Machine, Planner

    try:
        plan = Planner().plan_adapted(config, Machine(gpus=_world_size(config)))
    except Exception:  # of a model's own class: it may train all the same
        logger.debug("no plan of this run", exc_info=True)
        return None
    free, _ = torch.cuda.mem_get_info()
    needed = plan.memory.total - plan.memory.libraries
    if needed <= free:
        return None
    return tr(
        "warning: this run needs about {needed:.1f} GiB of GPU memory, and {free:.1f} GiB are "
        "free. 'xtuner plan {config} --gpu {total:.0f}GB' says what to change.",
        needed=needed / GIB,
        free=free / GIB,
        config=config.filename,
        total=torch.cuda.get_device_properties().total_memory / GIB,
    )


def _world_size(config: Config) -> int:
    names = LAUNCHER_ENV.get(config.get("launcher", "none"))
    return int(os.environ.get(names[1], "1")) if names else 1
