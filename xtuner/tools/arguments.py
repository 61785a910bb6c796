"""Command-line arguments that several commands have in common."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Sequence
from typing import Any

from xtuner.utils.dtypes import SHORT_NAMES
from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr

MAX_SHARD_SIZE = "2GB"


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Declare ``--cfg-options``; it may be given several times."""
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        default=[],
        action="extend",
        metavar="KEY=VALUE",
        help=tr("change settings of the config"),
    )


def add_dtype(parser: argparse._ActionsContainer, help_text: str, flag: str = "--dtype") -> None:
    """Declare an argument for a dtype: ``auto`` or a short name.

    Args:
        parser: a parser or a group of its arguments.
        help_text: what the dtype is for and what ``auto`` means.
        flag: the argument's name.
    """
    parser.add_argument(flag, choices=("auto", *SHORT_NAMES), default="auto", help=help_text)


def add_launcher(parser: argparse.ArgumentParser) -> None:
    """Declare ``--launcher``."""
    parser.add_argument(
        "--launcher",
        choices=("none", "pytorch", "slurm", "mpi"),
        default="none",
        help=tr("who started the processes"),
    )


def add_model_settings(parser: argparse.ArgumentParser) -> None:
    """Declare how a model is loaded for its answers: its dtype, its bits, its overflow."""
    add_dtype(parser, tr("dtype to load the model in (default: its own)"), "--torch-dtype")
    parser.add_argument(
        "--bits", type=int, choices=(4, 8), help=tr("load the model quantised to 4 or 8 bits")
    )
    parser.add_argument("--offload-folder", help=tr("folder for weights that do not fit in memory"))


def add_bot_name(parser: argparse.ArgumentParser) -> None:
    """Declare ``--bot-name``, which some templates have a place for."""
    parser.add_argument(
        "--bot-name", default="BOT", help=tr("the assistant's name, where the template has one")
    )


def add_stop_words(parser: argparse.ArgumentParser) -> None:
    """Declare ``--stop-words``."""
    parser.add_argument("--stop-words", nargs="+", default=[], help=tr("additional stop words"))


def add_max_new_tokens(parser: argparse.ArgumentParser, default: int) -> None:
    """Declare ``--max-new-tokens``."""
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=default,
        help=tr("maximum number of tokens of an answer"),
    )


def add_visual_select_layer(parser: argparse.ArgumentParser) -> None:
    """Declare ``--visual-select-layer``."""
    parser.add_argument(
        "--visual-select-layer",
        type=int,
        default=-2,
        help=tr("index of the visual encoder layer whose features LLaVA uses"),
    )


def add_trust_remote_code(parser: argparse.ArgumentParser) -> None:
    """Declare ``--trust-remote-code``; without it no code of a model folder runs."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help=tr("run code of the model folder where neither transformers nor XTuner has its class"),
    )


def read_arguments(words: Sequence[str]) -> dict[str, Any]:
    """Read ``NAME=VALUE`` words; a value is a Python literal, else text.

    Raises:
        UserError: for a word without a name.
    """
    read: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (equals and name.isidentifier()):
            raise UserError(
                tr("{word!r} is not NAME=VALUE", word=word), hint="enable_thinking=False"
            )
        try:
            read[name] = ast.literal_eval(
                {"true": "True", "false": "False", "none": "None"}.get(value.lower(), value)
            )
        except (ValueError, SyntaxError):
            read[name] = value
    return read


def add_max_shard_size(parser: argparse.ArgumentParser) -> None:
    """Declare ``--max-shard-size``, of the files that weights are written to."""
    parser.add_argument(
        "--max-shard-size",
        default=MAX_SHARD_SIZE,
        help=tr("largest size of a weight file (default: 2GB)"),
    )


def add_reader(parser: argparse.ArgumentParser) -> None:
    """Declare ``--for``, the program that is to read what is written."""
    parser.add_argument(
        "--for",
        dest="reader",
        choices=("transformers", "vllm", "sglang", "lmdeploy"),
        default="transformers",
        help=tr(
            "the program that will read it (default: transformers); for a server, names are "
            "compared with the class in the base's config.json, changed to its, or refused"
        ),
    )


def add_safe_serialization(parser: argparse.ArgumentParser) -> None:
    """Declare ``--safe-serialization`` and ``--no-safe-serialization``."""
    parser.add_argument(
        "--safe-serialization",
        action=argparse.BooleanOptionalAction,
        default=True,
        help=tr("write safetensors (default) or .bin"),
    )
