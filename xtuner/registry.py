"""Where names are looked up: what configs build, row map functions, readers of checkpoints."""

from mmengine.registry import Registry

__all__ = ["BUILDER", "MAP_FUNC", "READERS"]

BUILDER = Registry("builder")
MAP_FUNC = Registry("map_fn")
READERS = Registry("reader", locations=["xtuner.checkpoint.checkpoint"])
"""How parts below ``engine`` read what it wrote: ``READERS.get('weights')(path)``."""
