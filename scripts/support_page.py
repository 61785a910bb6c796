"""Write ``docs/*/support.md``: what was found for each architecture by ``benchmarks/support.py``.

``python scripts/support_page.py``; ``--check`` only compares, with status 1 for a stale page.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks/results/support.json"
COLUMNS = {
    "loads": {"en": "loads", "zh_cn": "加载"},
    "full": {"en": "full", "zh_cn": "全量"},
    "packed": {"en": "packed", "zh_cn": "打包"},
    "padded": {"en": "padded", "zh_cn": "填充"},
    "checkpointing": {"en": "recomputed", "zh_cn": "重计算"},
    "lora": {"en": "LoRA", "zh_cn": "LoRA"},
    "qlora": {"en": "QLoRA", "zh_cn": "QLoRA"},
    "autocast": {"en": "bf16", "zh_cn": "bf16"},
    "shared": {"en": "two ranks", "zh_cn": "两个进程"},
    "export": {"en": "convert", "zh_cn": "转换"},
    "merged": {"en": "merge", "zh_cn": "合并"},
    "images_packed": {"en": "images, packed", "zh_cn": "图片打包"},
    "images_padded": {"en": "images, padded", "zh_cn": "图片填充"},
}
MARKS = {"works": "✓", "refused": "–", "wrong": "✗", "fails": "✗", "untried": "?"}
NOT_MEASURED = " "
BEGIN, END = "<!-- scripts/support_page.py -->\n", "<!-- end -->\n"
SUMMARY = {
    "en": "{count} architectures, {date}, transformers {transformers}, torch {torch}, peft {peft}. "
    "✓: {works}.",
    "zh_cn": "{count} 个架构，{date}，transformers {transformers}，torch {torch}，peft {peft}。"
    "✓：{works}。",
}
HEAD = {"en": "architecture", "zh_cn": "架构"}
REASON = {"en": "reason", "zh_cn": "原因"}
LONGEST_REASON = 160


def page(language: str, written: str) -> str:
    """A page with the table of the result.

    Args:
        language: ``en`` or ``zh_cn``.
        written: the page as it is.
    """
    result = json.loads(RESULT.read_text("utf-8"))
    found: dict[str, Any] = result["architectures"]
    works = Counter(
        column
        for each in found.values()
        for column, (state, _) in each["cells"].items()
        if state == "works"
    )
    counts = ", ".join(
        f"{names[language]} {works[column]}" for column, names in COLUMNS.items() if works[column]
    )
    facts = {**result["versions"], "date": result["date"], "count": len(found)}
    titles = [HEAD[language], *(names[language] for names in COLUMNS.values()), REASON[language]]
    lines = [
        SUMMARY[language].format(**facts, works=counts),
        "",
        "| " + " | ".join(titles) + " |",
        "|---" * len(titles) + "|",
        *(_line(kind, each) for kind, each in found.items()),
    ]
    before, rest = written.split(BEGIN)
    after = rest.split(END)[1]
    return before + BEGIN + "\n" + "\n".join(lines) + "\n\n" + END + after


def _line(kind: str, found: dict[str, Any]) -> str:
    cells = found["cells"]
    marks = [MARKS[cells[name][0]] if name in cells else NOT_MEASURED for name in COLUMNS]
    reasons = [reason for _, reason in cells.values() if reason]
    reason = reasons[0].replace("|", "/")[:LONGEST_REASON].strip() if reasons else ""
    return f"| `{kind}` | " + " | ".join([*marks, reason]) + " |"


def main(arguments: list[str]) -> int:
    """Write the pages, or compare them."""
    stale = False
    for language in SUMMARY:
        file = ROOT / "docs" / language / "support.md"
        written = file.read_text("utf-8")
        text = page(language, written)
        if "--check" not in arguments:
            file.write_text(text, "utf-8")
        elif written != text:
            print(f"{file} is stale: run scripts/support_page.py")
            stale = True
    return int(stale)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
