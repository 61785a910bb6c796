"""Write the table of ``docs/*/check_cfg.md``: the codes of check-cfg and what they mean.

``python scripts/codes_page.py`` after a rule has changed; a test compares the pages.
"""

from __future__ import annotations

import os
from pathlib import Path

from xtuner.config.check import codes
from xtuner.utils.lang import translate

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- scripts/codes_page.py -->\n", "<!-- end -->\n"
HEAD = {
    "en": "| code | severity | meaning |\n|---|---|---|\n",
    "zh_cn": "| 代码 | 级别 | 含义 |\n|---|---|---|\n",
}


def table(language: str) -> str:
    """A line for each code, in a language of the docs."""
    before = os.environ.get("XTUNER_LANG")
    os.environ["XTUNER_LANG"] = language
    try:
        rows = [f"| {c.code} | {translate(c.severity)} | {c.title} |\n" for c in codes()]
    finally:
        if before is None:
            del os.environ["XTUNER_LANG"]
        else:
            os.environ["XTUNER_LANG"] = before
    return HEAD[language] + "".join(rows)


def page(language: str) -> str:
    """The text of ``check_cfg.md`` with the table of now."""
    text = (ROOT / "docs" / language / "check_cfg.md").read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(language)}\n{END}{after}"


if __name__ == "__main__":
    for name in HEAD:
        (ROOT / "docs" / name / "check_cfg.md").write_text(page(name), "utf-8")
