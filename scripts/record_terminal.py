"""Draw the terminal of the README: the quickstart is run, and what it prints becomes an SVG.

``python scripts/record_terminal.py FOLDER`` writes ``docs/images/quickstart.svg`` in a minute.
The commands run in FOLDER; those whose output is kept there are not run again.
Sample outputs before the end and the commands that are printed are left out, which ``⋮`` marks.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

OUT = Path(__file__).parent.parent / "docs" / "images" / "quickstart.svg"
WIDTH = 110
SHOWN = re.compile(
    r"^(model|parameters|data|steps|device|checkpoints|step|trained|user|assistant)\b"
)
QUESTIONS = "请做一下自我介绍\nRESET\nPlease introduce yourself\nexit\n"


def commands() -> Iterator[tuple[Sequence[str], str]]:
    """The words of each command of ``make quickstart``, and what is typed into it."""
    yield ("train", "quickstart", "--work-dir", "run"), ""
    yield ("convert", "pth_to_hf", "run/CHECKPOINT", "hf"), ""
    yield ("chat", "hf"), QUESTIONS


def output_of(words: Sequence[str], typed: str, folder: Path) -> str:
    """What a command prints.

    Raises:
        CalledProcessError: when it fails.
    """
    kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-m", "xtuner", *words],
        cwd=folder,
        input=typed,
        env={**kept, "XTUNER_LANG": "en", "HF_HUB_OFFLINE": "1", "COLUMNS": str(WIDTH)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    return done.stdout


def shortened(lines: Sequence[str]) -> Iterator[str]:
    """The lines that are shown, and ``⋮`` where some are left out."""
    before = True
    for line in lines:
        shown = bool(SHOWN.match(line))
        if shown or before:
            yield line if shown else "⋮"
        before = shown


def drawing(lines: Sequence[str]) -> str:
    """The SVG of a terminal with these lines; fonts are those of the reader's machine."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    for line in lines:
        style = "bold green" if line.startswith("$ ") else ""
        console.print(Text(line, style=style, no_wrap=True, overflow="ellipsis"))
    svg = console.export_svg(title="xtuner quickstart", unique_id="quickstart")
    # rich counts characters; a line with Chinese ones would be squeezed to half of its length
    svg = re.sub(r' textLength="[\d.]+"(?=[^>]*>[^<]*[\u4e00-\u9fff])', "", svg)
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.S)
    return "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"


def record(folder: Path) -> list[str]:
    """Run the commands in a folder, or read what they printed there; the lines of the terminal."""
    lines: list[str] = []
    folder.mkdir(parents=True, exist_ok=True)
    for words, typed in commands():
        kept = folder / f"{words[0]}.txt"
        checkpoint = next((file.name for file in folder.glob("run/iter_*.pth")), "")
        words = [word.replace("CHECKPOINT", checkpoint) for word in words]
        if not kept.is_file():
            kept.write_text(output_of(words, typed, folder), "utf-8")
        printed = kept.read_text("utf-8").replace(f"{folder}/", "")
        lines += [f"$ xtuner {' '.join(words)}", *shortened(printed.splitlines())]
    return lines


if __name__ == "__main__":
    OUT.write_text(drawing(record(Path(sys.argv[1]).resolve())), "utf-8")
