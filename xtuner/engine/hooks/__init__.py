"""What happens beside the training: shown, written down, asked, saved."""

from xtuner.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "checkpoint_hook": ("CheckpointHook",),
        "dataset_info_hook": ("DatasetInfoHook",),
        "early_stopping_hook": ("EarlyStoppingHook",),
        "evaluate_chat_hook": ("EvaluateChatHook",),
        "hf_checkpoint_hook": ("HFCheckpointHook",),
        "metrics_hook": ("MetricsHook",),
        "progress_hook": ("ProgressHook",),
        "throughput_hook": ("ThroughputHook",),
        "varlen_attn_args_hook": ("VarlenAttnArgsToMessageHubHook",),
    },
)
