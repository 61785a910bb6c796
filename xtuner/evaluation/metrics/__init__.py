"""Metrics of mmengine's kind."""

from xtuner.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__, {"mmlu_metric": ("MMLUMetric",), "reward_metric": ("RewardMetric",)}
)
