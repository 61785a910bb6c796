"""Tools that a MOSS model may call in a chat: calculate, solve, search."""

from xtuner.tools.plugins.calls import make_runner

__all__ = ["make_runner"]
