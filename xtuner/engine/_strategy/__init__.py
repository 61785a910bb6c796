"""How a model is spread over the processes of a run: copies, DeepSpeed, or FSDP."""

from xtuner.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "strategy": ("Strategy",),
        "deepspeed": ("DeepSpeedStrategy",),
        "fsdp": ("FSDPStrategy",),
    },
)
