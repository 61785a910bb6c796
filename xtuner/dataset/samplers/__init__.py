"""Orders in which the rows of a dataset are read; all are the same for any number of processes."""

from xtuner.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "length_grouped": ("LengthGroupedSampler",),
        "intern_repo": ("InternRepoSampler", "InternlmRepoSampler"),
    },
)
