"""Filters for messages of libraries that users can do nothing about."""

from __future__ import annotations

import logging
import os
import sys
import warnings


def quiet_libraries() -> None:
    """Filter out what libraries tell developers; ``--debug`` leaves it.

    Libraries' progress bars are for a terminal: in a file or a pipe each step would be a line.
    """
    ignore_future_warnings()
    # fewer processes than asked for would be another run
    warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # said by what raises
    logging.getLogger("DeepSpeed").addFilter(_not_about_its_device)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def ignore_future_warnings() -> None:
    """Ignore what transformers, peft and torch announce; our tests fail on it instead."""
    for module in (r"(transformers|peft)\.", r"torch\.distributed"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)


def _not_about_its_device(record: logging.LogRecord) -> bool:
    """DeepSpeed says that it takes the CPU as soon as accelerate imports it, asked for or not."""
    return "Setting accelerator" not in str(record.msg)
