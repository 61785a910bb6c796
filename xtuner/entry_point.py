"""The command tree: which commands there are and where their code is.

Nothing heavy may be imported here, and no command's module before that command is asked for: every
``--help`` must answer before torch could load. A command is one module under ``xtuner/tools`` with
two functions: ``add_arguments(parser)`` and ``run(args) -> exit status``. To add a command, write
that module and add its line to ``COMMANDS``.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from xtuner.tools.json_output import json_alone
from xtuner.utils.announce import announced_libraries
from xtuner.utils.argument_parser import (
    USAGE_ERROR,
    ArgumentParser,
    argparse_in_users_language,
)
from xtuner.utils.cpu import sleep_on_busy_machines
from xtuner.utils.errors import RunStopped, UserError
from xtuner.utils.lang import N_, tr, translate
from xtuner.utils.log_filters import quiet_libraries
from xtuner.utils.terminal import printable
from xtuner.version import __version__

INTERRUPTED = 130


@dataclass(frozen=True)
class Command:
    """One command: what it does (a marked message) and its module or its subcommands."""

    text: str
    module: str = ""
    commands: Mapping[str, Command] = field(default_factory=dict)

    @property
    def help(self) -> str:
        return translate(self.text)


CONVERT = {
    "pth_to_hf": Command(
        N_("turn a checkpoint of train into a Hugging Face model or adapter"),
        "model_converters.pth_to_hf",
    ),
    "merge": Command(
        N_("merge an adapter into its base model"),
        "model_converters.merge",
    ),
    "llava": Command(
        N_("rewrite a LLaVA model in another form"),
        "model_converters.llava",
    ),
    "phi_to_llama": Command(
        N_("rewrite a Phi-3 model as a Llama model"),
        "model_converters.phi_to_llama",
    ),
    "split": Command(
        N_("split a model into one file per tensor"),
        "model_converters.split",
    ),
}

PREPROCESS = {
    "sft": Command(
        N_("prepare a config's dataset before training"),
        "data_preprocess.sft",
    ),
    "arxiv": Command(N_("filter the arXiv metadata dump"), "data_preprocess.arxiv"),
    "refcoco": Command(
        N_("turn RefCOCO annotations into JSON"),
        "data_preprocess.refcoco",
    ),
    "untokenized": Command(
        N_("the same as sft, with the arguments of v0.1's script"),
        "data_preprocess.sft",
    ),
    "folder": Command(
        N_("tokenize a folder of data files, without a config"),
        "data_preprocess.folder",
    ),
    "llava": Command(
        N_("tokenize an image config's texts before training"),
        "data_preprocess.llava",
    ),
    "ftdp": Command(
        N_("tokenize FTDP chat files"),
        "data_preprocess.ftdp",
    ),
    "data-order": Command(
        N_("write the order of tokenized files to a file"),
        "data_preprocess.data_order",
    ),
}

COMMANDS: Mapping[str, Command] = {
    "doctor": Command(N_("check this machine and what a config needs of it"), "doctor"),
    "list-cfg": Command(N_("list the configs by name"), "list_cfg"),
    "copy-cfg": Command(N_("copy a config to edit it"), "copy_cfg"),
    "print-cfg": Command(N_("show a config as it will be used"), "print_cfg"),
    "check-cfg": Command(N_("check a config for errors"), "check_cfg"),
    "plan": Command(N_("plan a run: memory, steps, disk"), "before_training.plan"),
    "prove": Command(
        N_("prove that a config computes as the plain libraries do"),
        "before_training.prove",
    ),
    "rehearse": Command(
        N_("go through a whole run in a minute, with a small model"), "before_training.rehearse"
    ),
    "explain": Command(N_("explain a code of check-cfg or check-custom-dataset"), "explain"),
    "list-dataset-format": Command(
        N_("list the row layouts that map functions read"), "list_dataset_format"
    ),
    "check-custom-dataset": Command(N_("examine a config's whole dataset"), "check_custom_dataset"),
    "log-dataset": Command(N_("show a sample as the model will see it"), "log_dataset"),
    "preprocess": Command(N_("prepare data"), commands=PREPROCESS),
    "cache": Command(N_("list or delete prepared data"), "cache"),
    "train": Command(N_("train a model"), "train"),
    "dist_train": Command(N_("train with several processes"), "dist_train"),
    "test": Command(N_("evaluate a checkpoint"), "test"),
    "mmbench": Command(N_("evaluate a vision-language model on MMBench"), "mmbench"),
    "eval_refcoco": Command(N_("evaluate a LLaVA model on RefCOCO"), "eval_refcoco"),
    "plot": Command(N_("draw the curves of one or more runs"), "plot"),
    "convert": Command(N_("convert, merge or split models"), commands=CONVERT),
    "check-template": Command(
        N_("check that training and serving build the same prompt"),
        "check_template",
    ),
    "chat": Command(N_("chat with a model"), "chat"),
}


EXAMPLES = (
    "xtuner doctor my.py",
    "xtuner list-cfg qwen3 --method lora",
    "xtuner copy-cfg --model ./my-model --method lora --data my.jsonl .",
    "xtuner print-cfg quickstart --why optim_wrapper.optimizer.lr",
    "xtuner check-cfg my.py",
    "xtuner plan my.py --gpu 24GB",
    "xtuner prove my.py --page proofs.md",
    "xtuner rehearse my.py",
    "xtuner explain XT0302",
    "xtuner list-dataset-format -p sharegpt",
    "xtuner check-custom-dataset my.py --html report.html",
    "xtuner log-dataset my.py --index 3",
    "xtuner preprocess sft my.py prepared",
    "xtuner preprocess arxiv arxiv.json filtered.json",
    "xtuner preprocess refcoco --ann-path data/refcoco_annotations --save-path data",
    "xtuner preprocess untokenized my.py --save-folder prepared",
    "xtuner preprocess folder --data-folder data --save-folder prepared --tokenizer-path ./my-model"
    " --dataset-format openai",
    "xtuner preprocess llava my.py prepared",
    "xtuner preprocess ftdp --processed-dir data --tokenized-dir prepared"
    " --tokenizer-path ./my-model",
    "xtuner preprocess data-order --data-folder prepared --save-folder order --file-type .bin",
    "xtuner cache prune --days 30",
    "xtuner train my.py --work-dir runs/1 --cfg-options lr=1e-4",
    "xtuner dist_train my.py 8 --deepspeed deepspeed_zero2",
    "xtuner test my.py --checkpoint work_dirs/my/iter_500.pth",
    "xtuner mmbench ./my-llm --llava ./my-llava --visual-encoder ./my-encoder"
    " --prompt-template vicuna --data-path MMBench_DEV_EN.tsv --work-dir results",
    "xtuner eval_refcoco ./my-llm --llava ./my-llava --visual-encoder ./my-encoder"
    " --prompt-template vicuna --data-path refcoco_val.json",
    "xtuner plot runs/1 runs/2 --out both.png",
    "xtuner convert pth_to_hf my.py work_dirs/my/iter_500.pth adapter",
    "xtuner convert merge ./my-model adapter merged --max-shard-size 2GB",
    "xtuner convert llava ./my-llava out --save-format huggingface",
    "xtuner convert phi_to_llama ./phi-3 out",
    "xtuner convert split ./my-model pieces",
    "xtuner check-template my.py --data my.jsonl",
    "xtuner chat ./my-model --adapter adapter",
)
"""A line for the help of each command; the tests parse them."""


def example_of(path: str) -> str:
    """The example of a command, '' where there is none."""
    return next((line for line in EXAMPLES if line.startswith(f"{path} ")), "")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after ``xtuner``; those of this process when None.

    Returns:
        The exit status: 0 when it went well, 2 for a wrong command line, 70 for an error that
        nobody foresaw, 130 after Ctrl-C, 128 + N after signal N.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    if debug:
        words.remove("--debug")
    else:
        quiet_libraries()
    sleep_on_busy_machines()
    try:
        with announced_libraries():
            return _dispatch(words)
    except KeyboardInterrupt as error:  # or a signal that the command turns into one
        if debug:
            traceback.print_exc()
        if os.environ.get("RANK", "0") == "0":  # one message for all of them
            print(f"\n{error}" if str(error) else "\n" + tr("interrupted"), file=sys.stderr)
        return getattr(error, "status", INTERRUPTED)
    except BrokenPipeError:  # `xtuner list-cfg | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit:
        raise
    except BaseException as error:  # torch's CheckpointException, a panic of tokenizers
        if debug:
            traceback.print_exc()
        return _unforeseen(error, words)


def _unforeseen(error: BaseException, words: Sequence[str]) -> int:
    """The one place where errors of libraries become messages."""
    from xtuner import crash, library_errors

    known = library_errors.translate(error)
    if isinstance(known, RunStopped):
        print(known, file=sys.stderr)
        return known.status
    if known is not None:
        _print_error(str(known))
        return known.status
    mistakes = _mistakes_in_config(words)
    if mistakes is not None:
        _print_error(str(mistakes))
        return mistakes.status
    _print_error(crash.report(error, shlex.join(["xtuner", *words])))
    return crash.INTERNAL_ERROR


def _mistakes_in_config(words: Sequence[str]) -> UserError | None:
    """What ``check-cfg`` finds in the command's config: the likely cause of an unforeseen error."""
    from xtuner.config.check import check_or_raise
    from xtuner.config.load import load

    for word in words:
        if not (word.endswith((".py", ".yaml", ".yml", ".json")) and Path(word).is_file()):
            continue
        try:
            document = load(word)
            if document.values.get("model") is None:  # a file of data, or of another program
                continue
        except Exception:
            continue
        try:
            check_or_raise(document)
        except UserError as mistakes:
            return mistakes
        except Exception:  # the check may fail for the same reason as the command
            return None
    return None


def _dispatch(words: list[str]) -> int:
    name = words[0].lower() if words else "help"
    if name == "help" and len(words) > 1:  # of one command
        words = [*words[1:], "--help"]
        name = words[0].lower()
    if name in ("help", "-h", "--help"):
        print(_overview("xtuner", COMMANDS))
        return 0
    if name in ("version", "-v", "--version"):
        print(__version__)
        return 0
    path, command, rest = _find(words)
    if command.commands:
        print(_overview(path, command.commands))
        return 0 if rest else USAGE_ERROR
    module = importlib.import_module(f"xtuner.tools.{command.module}")
    with argparse_in_users_language():
        parser = ArgumentParser(path, command.help, example_of(path))
        parser.add_argument("--debug", action="store_true", help=tr("show tracebacks"))
        module.add_arguments(parser)
        parser.show_defaults()
        args = parser.parse_args(rest)
    args.argv = rest
    with json_alone() if getattr(args, "json", False) else contextlib.nullcontext():
        return int(module.run(args) or 0)


def _find(words: list[str]) -> tuple[str, Command, list[str]]:
    """Follow the words down the tree; the rest are the command's own arguments."""
    path, level, rest = "xtuner", COMMANDS, list(words)
    while True:
        word = rest.pop(0)
        name = _known(word.lower(), level)
        if name is None:
            raise UserError(
                tr("there is no command '{path} {word}'", path=path, word=word),
                hint=_suggestion(path, word, level),
                status=USAGE_ERROR,
            )
        path, command = f"{path} {name}", level[name]
        if not command.commands or not rest or rest[0] in ("-h", "--help"):
            return path, command, rest
        level = command.commands


def _known(word: str, level: Mapping[str, Command]) -> str | None:
    """The command meant by ``word``; '-' and '_' may stand for each other."""
    spellings = {name.replace("_", "-"): name for name in level}
    return spellings.get(word.replace("_", "-"))


def _suggestion(path: str, word: str, level: Mapping[str, Command]) -> str:
    near = difflib.get_close_matches(word, level, n=1, cutoff=0.5)
    if near:
        return tr("did you mean '{path} {near}'?", path=path, near=near[0])
    return tr("'{path} --help' lists the commands.", path=path)


def _overview(path: str, level: Mapping[str, Command]) -> str:
    width = max(map(len, level)) + 2
    lines = [tr("usage: {path} COMMAND ...", path=path), ""]
    lines += [f"  {name:<{width}}{command.help}" for name, command in level.items()]
    lines += [
        "",
        tr("See '{path} COMMAND --help'.", path=path),
    ]
    if level is COMMANDS:
        lines += [
            "",
            tr("The usual way:"),
            "  xtuner copy-cfg --model FOLDER_OR_HUB_ID --method lora --data FILE .",
            "  xtuner train CONFIG",
            "  xtuner convert pth_to_hf CHECKPOINT ADAPTER_DIR",
            "  xtuner convert merge BASE_MODEL ADAPTER_DIR MERGED_DIR",
            "  xtuner chat MERGED_DIR",
            tr("'xtuner list-cfg' lists ready-made configs: 'xtuner copy-cfg NAME .'."),
            "",
            tr("First time? 'xtuner train quickstart' needs no network."),
        ]
    return "\n".join(lines)


def _print_error(message: str) -> None:
    label = tr("error: ")
    if sys.stderr.isatty():
        label = f"\033[1;31m{label}\033[0m"
    print(f"{label}{printable(message)}", file=sys.stderr)
