"""``xtuner eval_refcoco``: how often a LLaVA model finds what a text names."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from xtuner.tools.vlm_evaluation import add_shared_arguments
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    add_shared_arguments(parser)
    parser.add_argument(
        "--image-folder",
        default="",
        help=tr("what the images' paths are relative to"),
    )


def run(args: argparse.Namespace) -> int:
    """Answer all questions; write ``refcoco_result.json``.

    Returns:
        0.
    """
    from xtuner.dataset.images import load_image
    from xtuner.dataset.refcoco_json import RefCOCOJsonEvalDataset
    from xtuner.evaluation.boxes import accuracy
    from xtuner.tools import vlm_evaluation
    from xtuner.utils.files import write_text

    if args.llava is None:
        raise UserError(
            tr("its boxes are those of images that LLaVA makes square."), hint="--llava FOLDER"
        )
    dataset = RefCOCOJsonEvalDataset(args.data_path)
    folder = vlm_evaluation.work_dir_of(args, "eval_refcoco")
    files = [str(Path(args.image_folder) / row["image"]) for row in dataset.rows]
    _require_images(files)
    vlm_evaluation.begin(args, "eval_refcoco")
    session = vlm_evaluation.load_session(args)

    def one(number: int) -> str:
        question = dataset.rows[number]["question"]
        return vlm_evaluation.answer(session, load_image(files[number]), question)

    answers = vlm_evaluation.answer_all(len(dataset), one, "RefCOCO")
    if answers is not None:
        share = accuracy(answers, [row["box"] for row in dataset.rows])
        rows = [{**row, "answer": said} for row, said in zip(dataset.rows, answers, strict=True)]
        text = json.dumps({"accuracy": share, "rows": rows}, ensure_ascii=False, indent=1)
        write_text(folder / "refcoco_result.json", text + "\n")
        print(
            tr(
                "accuracy (IoU above 0.5): {share:.2f} % of {count}",
                share=100 * share,
                count=len(rows),
            )
        )
        print(tr("results: {folder}", folder=folder))
    vlm_evaluation.leave()
    return 0


def _require_images(files: list[str]) -> None:
    """See that all images are there, before anything takes long."""
    from xtuner.dataset.images import problems_of

    paths = [Path(file) for file in dict.fromkeys(files)]
    wrong = [f"{path}: {why}" for path, why in zip(paths, problems_of(paths), strict=True) if why]
    if wrong:
        named = "\n".join(wrong[:50])
        raise UserError(
            tr("{count} images are bad:\n{named}", count=len(wrong), named=named),
            hint="--image-folder FOLDER",
            where=Where(key="--image-folder"),
        )
