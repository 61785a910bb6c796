"""The spellings of roles in published data, for mapping rows and for checking them."""

from __future__ import annotations

from collections.abc import Mapping

SHAREGPT: Mapping[str, str] = {"human": "user", "gpt": "assistant"}
OPENAI: Mapping[str, str] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
ANY: Mapping[str, str] = {
    **OPENAI,
    **SHAREGPT,
    "question": "user",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "tool_response": "tool",
}
"""All of them, each as ``system``, ``user``, ``assistant`` or ``tool``."""

CALLS = ("function_call", "tool_call")
"""Roles whose message is one call of a tool, as JSON."""
