"""What a case of the corpus gives: in the doctor, in training's dataset and in check-cfg."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import load_dataset

from xtuner.config.check.checker import check
from xtuner.dataset import map_fns
from xtuner.dataset.huggingface import process_hf_dataset
from xtuner.doctor.examine import examine
from xtuner.utils.errors import UserError
from xtuner.utils.templates import PROMPT_TEMPLATE

FOLDER = Path(__file__).parent
BASES = FOLDER.parent / "errors" / "base"


def table(name: str) -> list[dict[str, Any]]:
    """The cases of a table, a JSON object a line."""
    lines = (FOLDER / f"{name}.jsonl").read_text("utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def content(case: dict[str, Any]) -> bytes:
    """The bytes of a case's file: its lines, each a text or a row to be written as JSON."""
    lines = (each if isinstance(each, str) else json.dumps(each) for each in case["lines"])
    data = "".join(f"{line}\n" for line in lines).encode(
        case.get("encoding", "utf-8"), "surrogatepass"
    )
    if case["file"].endswith(".gz"):
        data = gzip.compress(data, mtime=0)
    return data[: case["cut"]] if "cut" in case else data


def dataset_of(case: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The dataset section of a config that trains on the case's file, which is written here."""
    Path(case["file"]).write_bytes(content(case))
    function = case.get("map_fn")
    template = case.get("template", "qwen_chat")
    adds = map_fns.template_map_fn_factory(PROMPT_TEMPLATE[template]) if template else None
    loader = dict(type=load_dataset, path=case.get("path", "json"), **case.get("loader", {}))
    return {
        "type": process_hf_dataset,
        "dataset": {**loader, "data_files": case.get("files", case["file"])},
        "tokenizer": tokenizer,
        "max_length": 512,
        "dataset_map_fn": getattr(map_fns, function) if function else None,
        "template_map_fn": adds,
        "remove_unused_columns": True,
        "pack_to_max_length": False,
        **case.get("settings", {}),
    }


def doctor(dataset: dict[str, Any]) -> dict[str, list[int]]:
    """The lines of each kind of finding; ``{"refused: text": []}`` where it cannot begin."""
    try:
        report, _ = examine("c.py", dataset)
    except UserError as error:
        return {"refused: " + str(error).partition("\n")[0]: []}
    return {f.code: [p.line for p in f.places] for f in report.scan.findings}


def train(dataset: dict[str, Any]) -> int | str:
    """How many rows reach training, or why there is no training."""
    arguments = {key: value for key, value in dataset.items() if key != "type"}
    try:
        return len(process_hf_dataset(**arguments))
    except UserError as error:
        return str(error)


def problems(case: dict[str, Any]) -> list[tuple[str, str]]:
    """Codes and texts of the problems of an edited base config."""
    config = Path("config.py")
    text = (BASES / f"{case.get('base', 'qlora')}.py").read_text("utf-8")
    if "old" in case:
        assert case["old"] in text, case
        text = text.replace(case["old"], case["new"], 1)
    config.write_text(text + "\n".join(["", *case.get("append", []), ""]), "utf-8")
    found = check(config, case.get("options", []))
    return [(p.code, f"{p.message} | {p.hint or ''}") for p in found]


def rows_of_tables(*names: str) -> Iterator[Any]:
    """pytest parameters of tables."""
    import pytest

    for name in names:
        yield from (pytest.param(case, id=f"{name}: {case['name']}") for case in table(name))
