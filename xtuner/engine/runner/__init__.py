"""The runner and its loops."""

from xtuner.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "loops": ("TrainLoop",),
        "val_loop": ("ValLoop", "TestLoop"),
        "finetune_runner": ("FinetuneRunner",),
    },
)
