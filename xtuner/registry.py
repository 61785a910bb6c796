"""Where names are looked up: what configs build, row map functions, readers of checkpoints."""

from typing import Any

from mmengine.registry import Registry, build_from_cfg

__all__ = ["BUILDER", "MAP_FUNC", "READERS"]


def _build(cfg: Any, *args: Any, registry: Registry, **kwargs: Any) -> Any:
    """Build from a config; what transformers makes, with our classes known to its Auto classes."""
    kind = cfg.get("type") if isinstance(cfg, dict) else None
    if str(getattr(kind, "__module__", "")).startswith("transformers."):
        registry.import_from_location()
    return build_from_cfg(cfg, registry, *args, **kwargs)


BUILDER = Registry(
    "builder", build_func=_build, locations=["xtuner.model.transformers_models.auto"]
)
MAP_FUNC = Registry("map_fn")
READERS = Registry("reader", locations=["xtuner.checkpoint.checkpoint"])
"""How parts below ``engine`` read what it wrote: ``READERS.get('weights')(path)``."""
