"""Metrics for ``xtuner test`` and for validation in training."""

from xtuner.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "metrics.mmlu_metric": ("MMLUMetric",),
        "metrics.reward_metric": ("RewardMetric",),
    },
)
