"""The plan of a run beside what its GPU has free, before the weights are read."""

from __future__ import annotations

import torch
from mmengine.config import Config
from mmengine.dist import get_world_size

from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr

GIB = 2**30


def memory_warning(config: Config) -> str | None:
    """What to say where a run will likely need more memory than this process's GPU has free.

    Args:
        config: adapted to this machine and its strategy.

    Returns:
        A warning; None where the run fits, nothing is known of its model, or there is no GPU.
    """
    if not torch.cuda.is_available():
        return None
    from xtuner.planning.plan import Machine, Planner

    try:
        plan = Planner().plan_adapted(config, Machine(gpus=get_world_size()))
    except UserError:  # a model that no plan is made of; building it will say more
        return None
    free, _ = torch.cuda.mem_get_info()
    needed = plan.memory.total - plan.memory.libraries
    if needed <= free:
        return None
    return tr(
        "this run needs about {needed:.1f} GiB of GPU memory, and {free:.1f} GiB are "
        "free. 'xtuner plan {config} --gpu {total:.0f}GB' says what to change.",
        needed=needed / GIB,
        free=free / GIB,
        config=config.filename,
        total=torch.cuda.get_device_properties().total_memory / GIB,
    )
