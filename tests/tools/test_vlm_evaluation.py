"""What ``mmbench`` and ``eval_refcoco`` share: the model that is asked, and what is refused."""

from __future__ import annotations

import base64
import json

import pytest

from tests.helpers.image_text import FAMILIES, image_text_folder, make_image
from tests.helpers.tiers import few_fast
from xtuner.entry_point import main


@pytest.fixture
def photo(tmp_path):
    file = tmp_path / "photo.png"
    make_image(40, 28, 5).save(file)
    return file


@pytest.mark.parametrize("kind", few_fast(FAMILIES, ("qwen2_5_vl",)))
def test_mmbench_asks_about_each_image(kind, photo, tmp_path):
    text = base64.b64encode(photo.read_bytes()).decode()
    lines = ["index\tquestion\tA\tB\tanswer\tcategory\timage"]
    lines += [f"{number}\tWhat color?\tred\tblue\tA\tcolor\t{text}" for number in range(2)]
    data = tmp_path / "questions.tsv"
    data.write_text("\n".join(lines) + "\n", "utf-8")
    words = ["mmbench", str(image_text_folder(kind)), "--data-path", str(data)]
    words += ["--max-new-tokens", "2", "--work-dir", str(tmp_path / "out")]
    assert main(words) == 0
    results = json.loads((tmp_path / "out" / "mmbench_result.json").read_text("utf-8"))
    assert len(results) == 2 and results[0]["prediction"] == results[1]["prediction"]


def test_evaluations_refuse_what_they_cannot_ask(photo, answering_model, tmp_path, capsys):
    data = tmp_path / "rows.tsv"
    image = base64.b64encode(photo.read_bytes()).decode()
    data.write_text(f"index\tquestion\tA\tB\timage\n0\tq\ta\tb\t{image}\n", "utf-8")
    boxes = ["eval_refcoco", str(answering_model), "--data-path", "x", "--image-folder", "y"]
    for reason, words in {
        "takes no images": ["mmbench", str(answering_model), "--data-path", str(data)],
        "that LLaVA makes square": boxes,
    }.items():
        assert main([*words, "--work-dir", str(tmp_path / "none")]) == 1
        assert reason in capsys.readouterr().err
