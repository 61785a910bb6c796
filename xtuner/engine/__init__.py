"""How a model is trained: configs, checks, the start, the runner and its hooks, checkpoints."""

from xtuner.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "hooks": (
            "DatasetInfoHook",
            "EvaluateChatHook",
            "HFCheckpointHook",
            "ThroughputHook",
            "VarlenAttnArgsToMessageHubHook",
        ),
        "_strategy": ("DeepSpeedStrategy",),
        "runner": ("TrainLoop",),
    },
)
