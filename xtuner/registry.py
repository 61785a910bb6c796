"""Where configs' ``type=`` names are looked up: anything buildable, and row map functions."""

from mmengine.registry import Registry

__all__ = ["BUILDER", "MAP_FUNC"]

BUILDER = Registry("builder")
MAP_FUNC = Registry("map_fn")
