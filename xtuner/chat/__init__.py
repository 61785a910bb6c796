"""Talking to a model: the prompt's tokens, the session with its history, the screen."""

from xtuner.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {"session": ("ChatSession", "Sampling"), "prompt": ("ChatPrompt",), "screen": ("run_chat",)},
)
