"""Which language messages are shown in: English, or Chinese where the user's locale asks for it."""

import os


def is_chinese() -> bool:
    """Whether people-facing text should be Chinese: ``XTUNER_LANG`` first, then the locale."""
    for variable in ("XTUNER_LANG", "LC_ALL", "LC_MESSAGES", "LANG"):
        value = os.environ.get(variable)
        if value:
            return value.lower().startswith("zh")
    return False


def tr(english: str, chinese: str) -> str:
    """Return the text in the user's language."""
    return chinese if is_chinese() else english
