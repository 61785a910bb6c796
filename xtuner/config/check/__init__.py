"""``xtuner check-cfg``: rules that find the mistakes of a config before anything is built."""

from xtuner.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "checker": ("check", "check_or_raise", "codes"),
        "code": ("ERROR", "WARNING"),
        "problem": ("RULES", "Problem"),
    },
)
