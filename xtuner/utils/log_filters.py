"""What libraries say that users can do nothing about is left out of the terminal and the logs."""

from __future__ import annotations

import logging
import os
import sys
import warnings


def quiet_libraries() -> None:
    """Leave out notes of libraries to their own developers; ``--debug`` brings them back.

    Libraries' progress bars are for a terminal: in a file or a pipe each step would be a line.
    """
    for module in (r"(transformers|peft)\.", r"torch\.distributed"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(_not_about_its_device)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def _not_about_its_device(record: logging.LogRecord) -> bool:
    """DeepSpeed says that it takes the CPU as soon as accelerate imports it, asked for or not."""
    return "Setting accelerator" not in str(record.msg)
