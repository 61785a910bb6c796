"""A faster import of mmengine's runner: without the packages that it searches for optimizers.

``mmengine.optim`` imports every package that has optimizers, to register their names. With
bitsandbytes, DeepSpeed and transformers that takes seconds, for names that a config hardly ever
uses (configs give the class itself, or the name of one of torch's).
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator

from xtuner.config.document import ConfigDocument
from xtuner.config.values import has_key, value_at

# What mmengine.optim and mmengine.runner try to import in order to register optimizers by name.
OPTIONAL = (
    "bitsandbytes",
    "colossalai",
    "dadaptation",
    "deepspeed",
    "lion_pytorch",
    "Sophia",
    "transformers",
)


@contextlib.contextmanager
def without_optional_optimizers() -> Iterator[None]:
    """Let imports of the optional packages fail at once; afterwards they work again.

    That goes for packages that are loaded, too: transformers would import what mmengine asks for,
    and remember that DeepSpeed and bitsandbytes are missing.
    """
    loaded = {name: sys.modules.get(name) for name in OPTIONAL}
    for name in OPTIONAL:
        sys.modules[name] = None  # type: ignore[assignment]  # makes `import name` raise at once
    try:
        yield
    finally:
        for name, module in loaded.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def optimizer_name(document: ConfigDocument) -> str | None:
    """The optimizer's name, where the config gives a name and not a class."""
    path = ["optim_wrapper", "optimizer", "type"]
    kind = value_at(document.values, path) if has_key(document.values, path) else None
    return kind if isinstance(kind, str) else None


def import_runner(named_optimizer: str | None) -> None:
    """Import mmengine's runner, slowly only where the config names an optimizer torch lacks.

    Args:
        named_optimizer: the optimizer's name, where the config gives a name and not a class.
    """
    import torch

    # "Adafactor" means transformers' to mmengine, although torch has one too.
    is_torch = hasattr(torch.optim, named_optimizer or "") and named_optimizer != "Adafactor"
    if named_optimizer is None or is_torch:
        with without_optional_optimizers():
            importlib.import_module("mmengine.runner")
    else:
        importlib.import_module("mmengine.runner")
