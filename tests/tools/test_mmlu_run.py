"""``xtuner test`` on MMLU's rows: the base model and a checkpoint, one process and two."""

import json

import pytest

from tests.helpers.forked import run_ranks
from tests.helpers.tiny import save_tiny

CONFIG = "internlm_7b_qlora_oasst1_mmlu_e3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mmlu")
    save_tiny(folder / "base")
    rows = [
        {"input": f"question {n}\nAnswer:", "output": "ABCD"[n % 4], "subject": subject}
        for n, subject in enumerate(["anatomy", "astronomy", "sociology"] * 3)
    ]
    for split in ("val", "test"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"five_shot_mmlu_{split}.json").write_text(text, "utf-8")
    return folder


def measure(folder, processes):
    words = ["test", CONFIG, "--work-dir", str(folder / f"out_{processes}"), "--cfg-options"]
    words += [f"pretrained_model_name_or_path={folder / 'base'}", f"mmlu_data_root={folder}/"]
    words += ["model.llm.quantization_config=None"]
    words += ["--launcher", "pytorch"] if processes > 1 else []
    done, *_ = run_ranks(processes, "-m", "xtuner", *words)
    assert "the base model (no --checkpoint)" in done.stdout
    assert "mmlu_fs_test/average" in done.stdout
    return json.loads((folder / f"out_{processes}" / "results.json").read_text("utf-8"))


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(folder):
    one, two = (measure(folder, count) for count in (1, 2))
    assert one == two
    assert {"mmlu_fs_test/anatomy", "mmlu_fs_test/STEM", "mmlu_fs_test/average"} <= set(one)
