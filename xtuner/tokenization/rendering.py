"""Chat templates of strangers: rendered within limits of time and memory.

transformers renders them in Jinja's sandbox, where they reach nothing; but they may not end.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr

TEMPLATE_SECONDS = 10
"""A chat template renders in milliseconds; one that takes so long does not end, or is hostile."""
TEMPLATE_BYTES = 2**30
"""Memory that rendering may take besides what the process has."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """End the block with an error after some seconds, in the main thread.

    Raises:
        UserError: when it takes longer, or more memory than ``TEMPLATE_BYTES``.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(number: int, frame: FrameType | None) -> None:
        raise _endless()

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with _memory_limit(TEMPLATE_BYTES):
            yield
    except (MemoryError, OverflowError) as error:
        raise _endless() from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _memory_limit(nbytes: int) -> Iterator[None]:
    """Let the process allocate so many bytes more in the block, where the system can say so."""
    usage = Path("/proc/self/statm")
    if not usage.is_file():
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(usage.read_text("ascii").split()[0]) * resource.getpagesize()
    allowed = [limit for limit in before if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([taken + nbytes, *allowed]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _endless() -> UserError:
    return UserError(
        tr("the tokenizer's chat template does not end, or needs too much memory."),
        hint=tr("use a template of ours (PROMPT_TEMPLATE); in chat --prompt-template NAME"),
    )


class ChatTemplate(Protocol):
    """What renders messages: a tokenizer, or a processor."""

    chat_template: str | dict[str, str] | None

    def apply_chat_template(self, conversation: Any, **settings: Any) -> Any: ...


def rendered(template: ChatTemplate, messages: object, **settings: object) -> str:
    """Render messages with the chat template of a tokenizer or a processor.

    Args:
        template: what has it.
        messages: dicts with ``role`` and ``content``.
        settings: further arguments of ``apply_chat_template``.

    Raises:
        UserError: when there is no template, it does not end, or needs what none has.
    """
    with time_limit(TEMPLATE_SECONDS):
        try:
            return str(template.apply_chat_template(messages, tokenize=False, **settings))
        except ValueError as error:
            if getattr(template, "chat_template", None):
                raise  # it refuses these messages
            raise UserError(
                tr("the tokenizer has no chat template"),
                hint=tr("use a template of ours (PROMPT_TEMPLATE); in chat --prompt-template NAME"),
            ) from error
        except (RecursionError, TypeError) as error:
            raise UserError(
                tr("the tokenizer's chat template fails: {why}", why=error),
                hint=tr("use a template of ours (PROMPT_TEMPLATE); in chat --prompt-template NAME"),
            ) from error
