"""Chat with a model: prompts as token ids, sessions with their history, the terminal."""

from xtuner.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {"session": ("ChatSession", "Sampling"), "prompt": ("ChatPrompt",), "screen": ("run_chat",)},
)
