"""``xtuner check-custom-dataset``: examine a whole dataset and say what to mend, and where."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("config", help=tr("name or path of a config", "配置的名字或路径"))
    parser.add_argument(
        "--html",
        metavar="FILE",
        help=tr("write the report as one HTML file", "把报告写成 HTML 文件"),
    )
    parser.add_argument(
        "--json", action="store_true", help=tr("print the report as JSON", "以 JSON 输出报告")
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help=tr("change settings of the config", "修改配置里的设置"),
    )


def run(args: argparse.Namespace) -> int:
    """Examine the dataset.

    Returns:
        0 when it is clean, 1 when there are problems.
    """
    from rich.console import Console

    from xtuner.dataset.doctor.examine import examine
    from xtuner.dataset.doctor.page import report_page
    from xtuner.dataset.doctor.report import print_report
    from xtuner.dataset.show import print_sample
    from xtuner.engine.config import load_config
    from xtuner.utils.files import write_text

    cfg = load_config(args.config, args.cfg_options)
    # Lazy, so that what the dataset does not need (DeepSpeed, ...) need not be there.
    dataset = train_dataset_of(cfg._to_lazy_dict(), args.config)
    quiet = Console(stderr=True)
    with quiet.status(tr("reading the rows ...", "正在读取数据 ...")):
        report, shown = examine(args.config, dataset)
    if args.html:
        write_text(args.html, report_page(report, shown))
    if args.json:
        print(json.dumps(report.as_dict(), ensure_ascii=False, indent=2))
    else:
        console = Console(highlight=False)
        print_report(report, console)
        if shown:
            print_sample(shown, console)
        console.print(report.advice, style="bold", markup=False)
        if args.html:
            print(tr(f"The report is in {args.html}", f"报告已写入 {args.html}"))
    return 0 if report.scan.findings.is_clean else 1


def train_dataset_of(cfg: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The settings of the dataset that a config trains on.

    Raises:
        UserError: when the config has none.
    """
    if cfg.get("framework", "mmengine") == "huggingface":
        key, dataset = "train_dataset", cfg.get("train_dataset")
    else:
        key, dataset = (
            "train_dataloader.dataset",
            (cfg.get("train_dataloader") or {}).get("dataset"),
        )
    if not isinstance(dataset, Mapping):
        raise UserError(
            tr("the config has no training dataset", "配置里没有训练数据集"),
            hint=tr(
                f"give it {key} = dict(type=process_hf_dataset, ...), as in "
                "'xtuner copy-cfg internlm2_chat_7b_qlora_custom_sft_e1 .'",
                f"请设置 {key} = dict(type=process_hf_dataset, ...)，可参考 "
                "'xtuner copy-cfg internlm2_chat_7b_qlora_custom_sft_e1 .'",
            ),
            where=Where(file=name, key=key),
        )
    return dataset
