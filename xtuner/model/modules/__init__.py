"""The parts of models: attention, losses, images, projectors."""

from xtuner.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "dispatch": ("dispatch_modules",),
        "projector": ("ProjectorConfig", "ProjectorModel"),
    },
)
