"""Import path of v0.1 for ``LoadWoInit``; transformers loads without initialising by itself now."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


class LoadWoInit(contextlib.AbstractContextManager["LoadWoInit"]):
    """``with LoadWoInit(): model = ...``: build modules without filling their weights first.

    ``from_pretrained`` of transformers 5 needs no help; for modules built by hand inside the block
    torch's initialisers are skipped.
    """

    def __enter__(self) -> LoadWoInit:
        self._block = _without_initialisation()
        self._block.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._block.__exit__(*error)


@contextlib.contextmanager
def _without_initialisation() -> Iterator[None]:
    from torch.nn import init

    names = ("constant_", "zeros_", "ones_", "uniform_", "normal_", "kaiming_uniform_")
    kept = {name: getattr(init, name) for name in names}
    for name in names:
        setattr(init, name, lambda tensor, *_, **__: tensor)
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(init, name, function)
