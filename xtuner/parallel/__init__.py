"""Process groups, and sequence parallelism: several ranks share each row."""

from xtuner.parallel import sequence
from xtuner.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "processes": ("init_single_process", "init_distributed"),
        **{f"sequence.{module}": names for module, names in sequence.EXPORTS.items()},
    },
)
