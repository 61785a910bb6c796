"""Where names are looked up: what configs build, row map functions, readers of checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmengine.registry import Registry, build_from_cfg

if TYPE_CHECKING:
    from mmengine import Config

__all__ = ["BUILDER", "LOADER_SETTINGS", "MAP_FUNC", "READERS"]


def _build(cfg: Config, *args: object, registry: Registry, **kwargs: object) -> Any:
    """Build from a config; what transformers loads, with our classes known to its Auto classes."""
    kind = cfg.get("type") if isinstance(cfg, dict) else None
    if str(getattr(kind, "__module__", "")).startswith("transformers."):
        registry.import_from_location()
        cfg = LOADER_SETTINGS.get("trust_remote_code")(cfg)
    return build_from_cfg(cfg, registry, *args, **kwargs)


BUILDER = Registry(
    "builder", build_func=_build, locations=["xtuner.model.transformers_models.auto"]
)
MAP_FUNC = Registry("map_fn")
READERS = Registry("reader", locations=["xtuner.checkpoint.checkpoint"])
"""How parts below ``engine`` read what it wrote: ``READERS.get('weights')(path)``."""
LOADER_SETTINGS = Registry("loader setting", locations=["xtuner.model.remote_code"])
"""How settings of a ``from_pretrained`` of transformers are resolved before it is called."""
