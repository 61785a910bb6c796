"""Compile the repeated layers of a model with torch.compile, once for all of them, on a GPU.

On a CPU compiled matrix products are slower than oneDNN's; see ``cpu.kernels``.

Attention is not compiled (its loop over samples depends on the data), lengths are dynamic, and the
names of weights do not change. transformers' layers checkpoint inside their ``forward``, where
torch.compile would give up the whole layer: what is compiled is inside of the checkpoint.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from xtuner.model.modules import attention

BACKEND = "inductor"


def compile_layers(model: nn.Module) -> int:
    """Compile the layers of a transformers model in place; they are compiled when first trained.

    Outside of training, as in the probe of the first batch, they compute as they are.

    Args:
        model: its lists of at least two layers of one class, each of which has several weights,
            are the repeated layers.

    Returns:
        How many layers are compiled.
    """
    from transformers import AttentionInterface

    for name in attention.NAMES:
        AttentionInterface.register(name, torch.compiler.disable(attention.attention))
    count = 0
    for blocks in _repeated(model):
        for block in blocks:
            kind: Any = type(block)  # typeshed's types are not hashable
            block.__class__ = _compiled_class(kind, BACKEND)
            count += 1
    return count


@functools.cache
def _compiled_class(kind: type[nn.Module], backend: Any) -> type[nn.Module]:
    """A subclass of a layer's class, by the same name, whose ``forward`` is compiled.

    transformers checkpoints the ``forward`` of the outermost class, as it does for FSDP's.
    """
    compiled = torch.compile(kind.forward, dynamic=True, backend=backend)

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: object, **kwargs: object) -> Any:
        return (compiled if self.training else kind.forward)(self, *args, **kwargs)

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), {"forward": forward, **names})


def _repeated(model: nn.Module) -> list[nn.ModuleList]:
    """The outermost lists of layers of one class."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 2:
            continue
        inner = any(name.startswith(f"{outer}.") for outer in found)
        alike = len({type(block) for block in module}) == 1
        if alike and not inner and len(list(module[0].parameters())) > 3:
            found[name] = module
    return list(found.values())
