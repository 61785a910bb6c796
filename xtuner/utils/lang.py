"""Messages in the user's language: English in the source, Chinese in ``xtuner/locale``."""

import functools
import gettext
import os
from pathlib import Path

DOMAIN = "xtuner"
LOCALE = Path(__file__).parent.parent / "locale"


def is_chinese() -> bool:
    """Whether people-facing text should be Chinese: ``XTUNER_LANG`` first, then the locale."""
    for variable in ("XTUNER_LANG", "LC_ALL", "LC_MESSAGES", "LANG"):
        value = os.environ.get(variable)
        if value:
            return value.lower().startswith(("zh", "cn"))
    return False


def tr(message: str, /, **values: object) -> str:
    """Return a message in the user's language: ``tr("no file {path}", path=path)``.

    With values, the message is a format string: ``{{`` and ``}}`` are literal braces. Without
    values it is returned as it is, and braces need no doubling. ``tests/utils/test_lang.py`` holds
    the rules.

    Args:
        message: the English text, a string literal (``make messages`` collects it from the source).
        values: what the placeholders of the message stand for, one for each name.
    """
    return translate(message, **values)


def N_(message: str, /) -> str:
    """Mark a literal for the catalogue, for example in a table; ``translate`` shows it later.

    The name is gettext's own.
    """
    return message


def translate(message: str, /, **values: object) -> str:
    """Like ``tr``, for a message in a variable that was marked elsewhere (``N_``)."""
    text = _chinese().gettext(message) if is_chinese() else message
    return text.format(**values) if values else text


@functools.cache
def _chinese() -> gettext.NullTranslations:
    return gettext.translation(DOMAIN, LOCALE, ["zh_CN"])
