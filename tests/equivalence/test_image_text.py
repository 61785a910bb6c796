"""Two processes train what one does on text, images and videos, in each way of sharing a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.equivalence.runs import train, train_on_ranks
from tests.equivalence.test_sequence_parallel import differences
from tests.helpers.image_text import image_text_folder, make_image
from tests.helpers.tiers import slow
from xtuner.checkpoint.checkpoint import find_latest, load_state_dict

CONFIG = "tests/equivalence/image_text_config.py"
STEPS, PROCESSES = 3, 2
KINDS = {
    "full": [],
    "lora": ["adapter=True"],
    "frozen": ["frozen=True"],
    "packed": ["packed=True"],
    "pairs": ["pairs=True", "packed=True"],
}
PAIRS = [("pairs", ""), ("pairs", "--fsdp")]
# A process keeps ZeRO-3 in mind, so that comes last.
WAYS = [
    *(("full", ""), ("lora", ""), ("packed", ""), *PAIRS),
    *(("full", "--fsdp"), ("frozen", "--fsdp")),
    *(("full", "deepspeed_zero3"), ("frozen", "deepspeed_zero3")),
]
FAST = [("packed", ""), ("full", "--fsdp"), ("frozen", "--fsdp")]


def save_rows(folder: Path, *, videos: bool = True) -> Path:
    """Rows of text, and between them rows with an image, a video or both.

    Batches of one process have none of these, one, or both, while those of the other have another:
    it calls the visual encoder as often. 30 rows are 18 packed ones, as many for each process.
    """
    rows = []
    for number in range(30):
        seen = ("", "<image>", "", "<video>", "", "<image><video>")[number % 6]
        if not videos:
            seen = seen.replace("<video>", "")
        answer = {"role": "assistant", "content": f"number {number} of them"}
        messages = [{"role": "user", "content": f"{seen}What is {number}?"}, answer]
        name = f"{number}.png"
        make_image(56, 28 + number % 12, number).save(folder / name)
        rejected = {"rejected_response": f"not {number}"}  # read by pairs alone
        files = {
            "images": [name] if "<image>" in seen else [],
            "videos": [[name, name]] if "<video>" in seen else [],
        }
        rows.append({"messages": messages, **files, **rejected})
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return file


# One test: the processes that are forked go through all runs.
@pytest.mark.parametrize("ways", [FAST, slow(PAIRS), slow(WAYS)], ids=["few", "pairs", "all"])
def test_two_processes_train_what_one_does(ways, tmp_path):
    base, rows = image_text_folder("qwen2_5_vl"), save_rows(tmp_path)
    words = ["--cfg-options", f"base={base}", f"data_files={rows}", f"steps={STEPS}"]
    for kind in dict.fromkeys(kind for kind, _ in ways):
        status, printed = train(CONFIG, tmp_path / kind, *words, *KINDS[kind])
        assert status == 0, printed
    runs = [
        [
            *(CONFIG, "--work-dir", tmp_path / f"{kind}{way}" / "2"),
            *(["--deepspeed", way] if way.startswith("deepspeed") else way.split()),
            *(*words, *KINDS[kind], f"ways={PROCESSES}"),
        ]
        for kind, way in ways
    ]
    train_on_ranks(PROCESSES, runs, tmp_path)
    off = [
        f"{kind} {way}: {difference}"
        for kind, way in ways
        for difference in differences(tmp_path / kind, tmp_path / f"{kind}{way}" / "2", STEPS - 1)
    ]
    assert not off, "\n".join(off)
    if ("frozen", "--fsdp") not in ways:
        return
    frozen = load_state_dict(find_latest(tmp_path / "frozen"))
    full = load_state_dict(find_latest(tmp_path / "full"))
    seeing = [name for name in full if ".visual." in name]
    assert seeing and any(bool((full[name] != frozen[name]).any()) for name in seeing)
