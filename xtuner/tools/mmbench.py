"""``xtuner mmbench``: a vision-language model's answers to MMBench, scored if it can be."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xtuner.tools.vlm_evaluation import add_shared_arguments
from xtuner.utils.errors import require
from xtuner.utils.lang import tr


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    add_shared_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Answer all questions; write ``mmbench_result.xlsx`` and ``.json``.

    Returns:
        0.
    """
    require("openpyxl", extra="eval", purpose="mmbench")
    from xtuner.evaluation import mmbench
    from xtuner.tools import vlm_evaluation

    rows = mmbench.read_questions(args.data_path)
    folder = vlm_evaluation.work_dir_of(args, "mmbench")
    vlm_evaluation.begin(args, "mmbench")
    session = vlm_evaluation.load_session(args)
    chinese = "_CN" in Path(args.data_path).name.upper()

    def one(number: int) -> str:
        row = rows[number]
        return vlm_evaluation.answer(session, _image(row), mmbench.question_text(row, chinese))

    answers = vlm_evaluation.answer_all(len(rows), one, "MMBench")
    if answers is not None:
        results = [
            {**{k: v for k, v in row.items() if k != "image"}, "prediction": said}
            for row, said in zip(rows, answers, strict=True)
        ]
        _write(folder, results)
        if all(row.get("answer") for row in rows):
            found = mmbench.scores(results)
            (folder / "mmbench_score.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
            vlm_evaluation.print_table("MMBench", found, [tr("category"), "%"])
        else:
            print(tr("this split has no answers: submit mmbench_result.xlsx to MMBench's server."))
        print(tr("results: {folder}", folder=folder))
    vlm_evaluation.leave()
    return 0


def _image(row: Mapping[str, str]) -> Any:
    from xtuner.dataset.images import decode_base64_to_image

    return decode_base64_to_image(row["image"])


def _write(folder: Path, results: Sequence[Mapping[str, Any]]) -> None:
    from openpyxl import Workbook

    from xtuner.utils.files import written_aside

    book = Workbook()
    sheet: Any = book.active
    sheet.append(list(results[0]))
    for row in results:
        sheet.append([row[name] for name in results[0]])
    buffer = io.BytesIO()
    book.save(buffer)
    with written_aside(folder / "mmbench_result.xlsx") as aside:
        aside.write_bytes(buffer.getvalue())
    with written_aside(folder / "mmbench_result.json") as aside:
        aside.write_text(json.dumps(results, ensure_ascii=False, indent=1) + "\n", "utf-8")
