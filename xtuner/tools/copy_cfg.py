"""``xtuner copy-cfg``: write a config into a folder, to be edited there."""

from __future__ import annotations

import argparse
from pathlib import Path

from xtuner.configs import UnknownConfig, render
from xtuner.utils.errors import UserError
from xtuner.utils.files import write_text
from xtuner.utils.lang import tr


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument(
        "config_name",
        help=tr(
            "a name: <model>_<method>_<dataset>_e<epochs>", "名字：<模型>_<方法>_<数据集>_e<轮数>"
        ),
    )
    parser.add_argument("save_dir", help=tr("the folder to write to", "写到哪个文件夹"))
    parser.add_argument(
        "--force",
        action="store_true",
        help=tr("replace a file that is there already", "覆盖已有的文件"),
    )


def run(args: argparse.Namespace) -> int:
    """Write ``<save_dir>/<config_name>_copy.py``.

    Raises:
        UserError: for a name that is none, or when the file is there already.
    """
    name = args.config_name
    try:
        text = render(name)
    except UnknownConfig as error:
        raise unknown(error) from None
    path = Path(args.save_dir) / f"{name}_copy.py"
    if path.exists() and not args.force:
        raise UserError(
            tr(f"{path} is there already.", f"{path} 已经存在。"),
            hint=tr(
                "--force replaces it; or name another folder.", "用 --force 覆盖，或换一个文件夹。"
            ),
        )
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(
            tr(f"cannot write {path}: {error.strerror}", f"无法写入 {path}: {error.strerror}")
        ) from None
    print(tr(f"Copy to {path}", f"已复制到 {path}"))
    print(tr("Edit its PART 1, then:", "修改其中的 PART 1，然后:"))
    print(f"  xtuner train {path}")
    return 0


def unknown(error: UnknownConfig) -> UserError:
    """The message for a name that is none."""
    near = "".join(f"\n  {name}" for name in error.suggestions)
    listing = tr(
        "'xtuner list-cfg -p TEXT' searches the names.", "'xtuner list-cfg -p 文字' 可以搜索。"
    )
    hint = tr(f"did you mean{near}\n{listing}", f"是不是{near}\n{listing}") if near else listing
    return UserError(
        tr(
            f"there is no config {error.name!r}: {error.reason}.",
            f"没有配置 {error.name!r}: {error.reason_zh}。",
        ),
        hint=hint,
    )
