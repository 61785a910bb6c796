"""The command tree: which commands there are and where their code is.

Nothing heavy may be imported here, and no command's module before that command is asked for: every
``--help`` must answer before torch could load. A command is one module under ``xtuner/tools`` with
two functions: ``add_arguments(parser)`` and ``run(args) -> exit status``. To add a command, write
that module and add its line to ``COMMANDS``.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr
from xtuner.utils.log_filters import quiet_libraries
from xtuner.version import __version__

INTERRUPTED = 130
USAGE_ERROR = 2


@dataclass(frozen=True)
class Command:
    """One command: what it does (English, Chinese) and its module or its subcommands."""

    english: str
    chinese: str
    module: str = ""
    commands: Mapping[str, Command] = field(default_factory=dict)

    @property
    def help(self) -> str:
        return tr(self.english, self.chinese)


CONVERT = {
    "pth_to_hf": Command(
        "turn a checkpoint of train into a Hugging Face model or adapter",
        "把 train 的检查点转换成 Hugging Face 模型或适配器",
        "model_converters.pth_to_hf",
    ),
    "merge": Command(
        "merge an adapter into its base model",
        "把适配器合并进基座模型",
        "model_converters.merge",
    ),
    "llava": Command(
        "rewrite a LLaVA model in another form",
        "把 LLaVA 模型改写成另一种格式",
        "model_converters.llava",
    ),
    "phi_to_llama": Command(
        "rewrite a Phi-3 model as a Llama model",
        "把 Phi-3 模型改写成 Llama 模型",
        "model_converters.phi_to_llama",
    ),
    "split": Command(
        "split a model into one file per tensor",
        "把模型按张量拆分成单独的文件",
        "model_converters.split",
    ),
}

PREPROCESS = {
    "sft": Command(
        "prepare a config's dataset ahead of training",
        "提前准备配置里的数据集",
        "data_preprocess.sft",
    ),
    "arxiv": Command(
        "filter the arXiv metadata dump", "筛选 arXiv 元数据", "data_preprocess.arxiv"
    ),
    "refcoco": Command(
        "turn RefCOCO annotations into JSON",
        "把 RefCOCO 标注转换成 JSON",
        "data_preprocess.refcoco",
    ),
    "untokenized": Command(
        "the same as sft, with the published script's words",
        "与 sft 相同，参数与旧脚本一致",
        "data_preprocess.sft",
    ),
    "folder": Command(
        "tokenize a folder of data files, without a config",
        "不用配置，直接对一个文件夹的数据分词",
        "data_preprocess.folder",
    ),
    "llava": Command(
        "prepare the texts of an image config ahead of training",
        "提前准备图文配置里的文本",
        "data_preprocess.llava",
    ),
    "ftdp": Command(
        "tokenize FTDP chat files",
        "对 FTDP 对话文件分词",
        "data_preprocess.ftdp",
    ),
    "data-order": Command(
        "write down the order of tokenized files",
        "记录已分词文件的顺序",
        "data_preprocess.data_order",
    ),
}

COMMANDS: Mapping[str, Command] = {
    "list-cfg": Command("list the configs by name", "列出可用的配置", "list_cfg"),
    "copy-cfg": Command("copy a config to edit it", "复制一份配置以便修改", "copy_cfg"),
    "print-cfg": Command("show a config as it will be used", "显示配置最终的取值", "print_cfg"),
    "check-cfg": Command("find the mistakes in a config", "检查配置里的错误", "check_cfg"),
    "list-dataset-format": Command(
        "list the row layouts that map functions read", "列出支持的数据格式", "list_dataset_format"
    ),
    "check-custom-dataset": Command(
        "examine a config's whole dataset", "检查配置里的整个数据集", "check_custom_dataset"
    ),
    "log-dataset": Command(
        "show a sample as the model will see it", "显示模型实际看到的样本", "log_dataset"
    ),
    "preprocess": Command("prepare data", "数据预处理", commands=PREPROCESS),
    "train": Command("train", "训练", "train"),
    "dist_train": Command("train with several processes", "多进程训练", "dist_train"),
    "test": Command("evaluate a checkpoint", "评测检查点", "test"),
    "mmbench": Command(
        "measure a LLaVA model on MMBench", "在 MMBench 上评测 LLaVA 模型", "mmbench"
    ),
    "eval_refcoco": Command(
        "measure how a LLaVA model finds things", "在 RefCOCO 上评测 LLaVA 模型", "eval_refcoco"
    ),
    "plot": Command("draw the curves of one or more runs", "绘制训练曲线", "plot"),
    "convert": Command("convert, merge or split models", "转换、合并、拆分模型", commands=CONVERT),
    "check-template": Command(
        "check that training and serving build the same prompt",
        "检查训练与推理的提示词是否一致",
        "check_template",
    ),
    "chat": Command("talk to a model", "与模型对话", "chat"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after ``xtuner``; those of this process when None.

    Returns:
        The exit status: 0 when it went well, 2 for a wrong command line, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    if debug:
        words.remove("--debug")
    else:
        quiet_libraries()
    try:
        return _dispatch(words)
    except UserError as error:
        if debug:
            traceback.print_exc()
        _complain(str(error))
        return error.status
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        _complain(tr("interrupted", "已中断"))
        return INTERRUPTED
    except BrokenPipeError:  # `xtuner list-cfg | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(words: list[str]) -> int:
    name = words[0].lower() if words else "help"
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
    parser = _Parser(prog=path, description=command.help)
    parser.add_argument(
        "--debug", action="store_true", help=tr("show tracebacks", "出错时显示调用栈")
    )
    module.add_arguments(parser)
    args = parser.parse_args(rest)
    args.argv = rest
    return int(module.run(args) or 0)


def _find(words: list[str]) -> tuple[str, Command, list[str]]:
    """Follow the words down the tree; the rest are the command's own arguments."""
    path, level, rest = "xtuner", COMMANDS, list(words)
    while True:
        word = rest.pop(0)
        name = _known(word.lower(), level)
        if name is None:
            raise UserError(
                tr(f"there is no command '{path} {word}'", f"没有命令 '{path} {word}'"),
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
        return tr(f"did you mean '{path} {near[0]}'?", f"是不是 '{path} {near[0]}'？")
    return tr(f"'{path} --help' lists the commands.", f"'{path} --help' 会列出所有命令。")


def _overview(path: str, level: Mapping[str, Command]) -> str:
    width = max(map(len, level)) + 2
    lines = [tr(f"usage: {path} COMMAND ...", f"用法: {path} 命令 ..."), ""]
    lines += [f"  {name:<{width}}{command.help}" for name, command in level.items()]
    lines += [
        "",
        tr(f"'{path} COMMAND --help' tells more.", f"'{path} 命令 --help' 显示详细说明。"),
    ]
    if level is COMMANDS:
        lines += [
            "",
            tr("The usual way:", "通常的步骤:"),
            "  xtuner list-cfg -p internlm2",
            "  xtuner copy-cfg internlm2_5_chat_7b_qlora_alpaca_e3 .",
            "  xtuner train internlm2_5_chat_7b_qlora_alpaca_e3_copy.py",
            "  xtuner convert pth_to_hf CONFIG CHECKPOINT ADAPTER_DIR",
            "  xtuner convert merge BASE_MODEL ADAPTER_DIR MERGED_DIR",
            "  xtuner chat MERGED_DIR",
            "",
            tr(
                "First time? 'xtuner train quickstart' needs no network.",
                "第一次使用？'xtuner train quickstart' 不需要网络。",
            ),
        ]
    return "\n".join(lines)


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints look like all our others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(
            f"{self.prog}: {message}",
            hint=tr(
                f"'{self.prog} --help' lists the arguments.",
                f"'{self.prog} --help' 会列出所有参数。",
            ),
            status=USAGE_ERROR,
        )


def _complain(message: str) -> None:
    label = tr("error", "错误")
    if sys.stderr.isatty():
        label = f"\033[1;31m{label}\033[0m"
    print(f"{label}: {message}", file=sys.stderr)
