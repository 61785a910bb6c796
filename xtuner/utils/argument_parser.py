"""argparse with our error messages, defaults and an example in each help, and words in Chinese."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import gettext
import os
import re
import shutil
from collections.abc import Iterator
from typing import NoReturn

from xtuner.utils.errors import UserError
from xtuner.utils.lang import DOMAIN, LOCALE, N_, is_chinese, tr
from xtuner.utils.terminal import width, wrapped

USAGE_ERROR = 2
OF_ARGPARSE = (
    N_("usage: "),
    N_("positional arguments"),
    N_("options"),
    N_("show this help message and exit"),
    N_("argument %(argument_name)s: %(message)s"),
    N_("the following arguments are required: %s"),
    N_("unrecognized arguments: %s"),
    N_("not allowed with argument %s"),
    N_("ambiguous option: %(option)s could match %(matches)s"),
    N_("expected one argument"),
    N_("expected at most one argument"),
    N_("expected at least one argument"),
    N_("invalid %(type)s value: %(value)r"),
    N_("invalid choice: %(value)r (choose from %(choices)s)"),
)
"""What argparse says by gettext; marked here so that our catalogue has it."""
_OPTION = re.compile(r"(?<![\w-])(--[\w-]+)(?:[= ](?!-)(\S+))?")
# Names of other tools for the same settings: only suggested, never accepted.
OTHER_NAMES = {
    "learning_rate": "lr",
    "num_train_epochs": "max_epochs",
    "num_epochs": "max_epochs",
    "epochs": "max_epochs",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulative_counts",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "cutoff_len": "max_length",
    "model_name_or_path": "pretrained_model_name_or_path",
    "output_dir": "work_dir",
    "max_grad_norm": "max_norm",
    "seed": "randomness.seed",
}


@contextlib.contextmanager
def argparse_in_users_language() -> Iterator[None]:
    """Let argparse, which asks gettext's current domain, speak as our own messages do."""
    before, language = gettext.textdomain(), os.environ.get("LANGUAGE")
    gettext.bindtextdomain(DOMAIN, str(LOCALE))
    gettext.textdomain(DOMAIN)
    os.environ["LANGUAGE"] = "zh_CN" if is_chinese() else "en"
    try:
        yield
    finally:
        gettext.textdomain(before)
        if language is None:
            del os.environ["LANGUAGE"]
        else:
            os.environ["LANGUAGE"] = language


def _wider(text: str) -> int:
    """Columns that a text takes beyond its number of characters."""
    return width(text) - len(text)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """argparse's, which counts characters, for a language whose characters take two columns."""

    def __init__(self, prog: str) -> None:
        columns = shutil.get_terminal_size().columns - 2
        super().__init__(prog, width=columns - _wider(tr("usage: ")))

    def _split_lines(self, text: str, width: int) -> list[str]:
        return wrapped(text, width) if is_chinese() else super()._split_lines(text, width)


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, for one command.

    Args:
        prog: the command, such as ``xtuner train``.
        description: what it does.
        example: a line that can be typed.
    """

    def __init__(self, prog: str, description: str, example: str) -> None:
        self.example = example
        epilog = tr("example:") + f"\n  {example}" if example else None
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=_Formatter,
        )

    def format_help(self) -> str:
        """The help, with the marks and the indentation of the user's language."""
        text = super().format_help()
        if not is_chinese():
            return text
        for group in self._action_groups:
            text = text.replace(f"\n{group.title}:\n", f"\n{tr('{title}:', title=group.title)}\n")
        usage, gap, rest = text.partition("\n\n")
        return usage.replace("\n", "\n" + " " * _wider(tr("usage: "))) + gap + rest

    def show_defaults(self) -> None:
        """Add the defaults to the help texts; to be called when all arguments are declared."""
        told = (tr("default"), argparse.SUPPRESS)
        for action in self._actions:
            unset = action.default in (None, False, "", argparse.SUPPRESS) or action.default == []
            if action.help and not unset and not any(word in action.help for word in told):
                action.help += tr(" (default: {default})", default="%(default)s")

    def error(self, message: str) -> NoReturn:
        raise UserError(
            f"{self.prog}: {message}",
            hint=self._meant(message) or self._usage_hint(),
            status=USAGE_ERROR,
        )

    def _usage_hint(self) -> str:
        listing = tr("'{prog} --help' lists the arguments.", prog=self.prog)
        return f"{self.example}\n{listing}" if self.example else listing

    def _meant(self, message: str) -> str | None:
        """The argument that was probably meant by one that there is not."""
        found = _OPTION.search(message)
        name, value = found.groups() if found else ("", None)
        setting = name.lstrip("-").replace("-", "_")
        setting = OTHER_NAMES.get(setting, setting)
        known = [key for key in self._option_string_actions if key.startswith("--")]
        same = f"--{setting.replace('_', '-')}"
        near = difflib.get_close_matches(same, known, n=1, cutoff=0.75)
        if not name or name in known or setting in ("config", "config_file"):
            return None
        if near:
            return tr("did you mean '{near}'?", near=near[0])
        if "--cfg-options" in known:
            return tr(
                "a setting of the config is changed with '--cfg-options {setting}'.",
                setting=f"{setting}={value or 'VALUE'}",
            )
        return None
