"""The embedded example: a small model, its tokenizer and its data, created locally.

``xtuner train quickstart`` needs no network: ``make_base`` writes an ordinary Hugging Face folder
with random weights, and ``load_rows`` gives questions about who the assistant is, in Chinese and
English, answered with the name that the config sets.
"""

from xtuner.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__, {"base": ("make_base",), "rows": ("load_rows",)}
)
