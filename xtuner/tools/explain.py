"""``xtuner explain``: what a code of check-cfg or a finding of check-custom-dataset means."""

from __future__ import annotations

import argparse
import difflib
import textwrap
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr, translate
from xtuner.utils.terminal import wrapped

if TYPE_CHECKING:
    from xtuner.config.check.code import Code
    from xtuner.doctor.rules import Rule

WIDTH = 79
INDENT = "    "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "code",
        nargs="?",
        help=tr("a code such as XT0302 or a name such as few-steps (default: list all)"),
    )


def run(args: argparse.Namespace) -> int:
    """Print the explanation of one code, or all codes with their titles.

    Raises:
        UserError: when there is no such code; it names those that are near.
    """
    from xtuner.config.check import codes
    from xtuner.doctor.rules import RULES

    of_configs = {code.code: code for code in codes()}
    if args.code is None:
        print("\n".join(_listed(of_configs, RULES)))
        return 0
    name = _spelled(args.code)
    if name in of_configs:
        print(_of_config(of_configs[name]))
    elif name in RULES:
        print(_of_data(name, RULES[name]))
    else:
        raise _unknown(args.code, name, [*of_configs, *RULES])
    return 0


def _spelled(word: str) -> str:
    """A code as it is written: ``xt302`` and ``302`` are XT0302, ``few_steps`` is few-steps."""
    digits = word.upper().removeprefix("XT")
    return f"XT{digits:0>4}" if digits.isdecimal() else word.lower().replace("_", "-")


def _listed(of_configs: Mapping[str, Code], of_data: Mapping[str, Rule]) -> Iterator[str]:
    yield tr("Codes of 'xtuner check-cfg' and of 'xtuner train':")
    for name, code in of_configs.items():
        yield f"  {name}  {code.title}"
    width = max(map(len, of_data))
    yield ""
    yield tr("Findings of 'xtuner check-custom-dataset':")
    for name, rule in of_data.items():
        yield f"  {name:<{width}}  {rule.title}"
    yield ""
    yield tr("'xtuner explain CODE' says what a code means and what to do.")


def _title(name: str, level: str, title: str) -> str:
    return tr("{name} ({level}): {title}", name=name, level=translate(level), title=title)


def _of_config(code: Code) -> str:
    return "\n".join(
        (
            _title(code.code, code.severity, code.title),
            "",
            "\n".join(wrapped(code.reason, WIDTH)),
            "",
            tr("Example:"),
            textwrap.indent(code.wrong, INDENT),
            "",
            tr("Fix:"),
            textwrap.indent(code.right, INDENT),
        )
    )


def _of_data(name: str, rule: Rule) -> str:
    return "\n".join(
        (
            _title(name, rule.level, rule.title),
            "",
            "\n".join(wrapped(rule.advice, WIDTH)),
            "",
            tr("'xtuner check-custom-dataset CONFIG' shows the rows and what to change."),
        )
    )


def _unknown(word: str, name: str, known: list[str]) -> UserError:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return UserError(
        tr("there is no code '{word}'", word=word),
        hint=tr("did you mean one of these: {near}?", near=", ".join(near))
        if near
        else tr("'xtuner explain' lists all codes."),
    )
