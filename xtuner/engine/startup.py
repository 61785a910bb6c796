"""A quicker import of mmengine's runner: without the optional packages it looks for on the way.

``mmengine.optim`` tries to import every optimizer package there is, to register their names. With
bitsandbytes and DeepSpeed installed that takes seconds, each time, for names that a config hardly
ever uses (configs hand over the class itself, or name one of torch's).
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator

# What mmengine.optim and mmengine.runner try to import in order to register optimizers by name.
OPTIONAL = ("bitsandbytes", "dadaptation", "lion_pytorch", "Sophia", "deepspeed", "colossalai")


@contextlib.contextmanager
def without_optional_optimizers() -> Iterator[None]:
    """Let imports of the optional packages fail quickly; afterwards all is as it was.

    Packages that are loaded already stay as they are.
    """
    blocked = [name for name in OPTIONAL if name not in sys.modules]
    for name in blocked:
        sys.modules[name] = None  # type: ignore[assignment]  # makes `import name` raise at once
    try:
        yield
    finally:
        for name in blocked:
            del sys.modules[name]


def import_runner(named_optimizer: str | None) -> None:
    """Import mmengine's runner, slowly only where the config names an optimizer torch lacks.

    Args:
        named_optimizer: the optimizer's name, where the config gives a name and not a class.
    """
    import torch

    if named_optimizer is None or hasattr(torch.optim, named_optimizer):
        with without_optional_optimizers():
            importlib.import_module("mmengine.runner")
    else:
        importlib.import_module("mmengine.runner")
