"""Configs: loading by name or path, overriding, checking, adapting, writing. Needs no torch."""

from xtuner.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "document": ("ConfigDocument",),
        "load": ("load",),
        "override": ("load_config", "override"),
        "dump": ("dump", "dump_config", "write_config"),
    },
)
