"""MMLU, MMBench, RefCOCO and reward scores equal those worked out by hand."""

import base64
import io

import pytest
import torch
from datasets import Dataset
from PIL import Image

from tests.helpers.tiny import make_tokenizer
from xtuner.dataset import process_hf_dataset
from xtuner.dataset.collate_fns import mmlu_collate_fn
from xtuner.dataset.map_fns import default_map_fn
from xtuner.dataset.refcoco_json import RefCOCOJsonEvalDataset, box_text, read_boxes
from xtuner.evaluation import MMLUMetric
from xtuner.evaluation.boxes import accuracy, intersection_over_union, read_box
from xtuner.evaluation.metrics.mmlu_subjects import GROUPS
from xtuner.evaluation.metrics.reward_metric import RewardMetric
from xtuner.evaluation.mmbench import letter_in, question_text, read_questions, scores
from xtuner.utils.errors import UserError


def test_mmlu_reads_the_letter_at_the_end_of_each_prompt():
    tokenizer = make_tokenizer()
    rows = [
        {"input": "1 + 1\nAnswer:", "output": "B", "subject": "abstract_algebra"},
        {"input": "2 + 2, a longer question\nAnswer:", "output": "A", "subject": "anatomy"},
        {"input": "law\nAnswer:", "output": "C", "subject": "professional_law"},
        {"input": "law again\nAnswer:", "output": "D", "subject": "professional_law"},
    ]
    made = process_hf_dataset(
        Dataset.from_list(rows),
        tokenizer=tokenizer,
        dataset_map_fn=default_map_fn,
        max_length=64,
        pack_to_max_length=False,
        input_ids_with_output=False,
    )
    batch = mmlu_collate_fn(list(made))
    metric = MMLUMetric(tokenizer=tokenizer, prefix="mmlu_fs_val")
    lengths = batch["data"]["attention_mask"].sum(1)
    logits = torch.zeros(4, int(lengths.max()), len(tokenizer))
    for row, letter in enumerate((1, 1, 2, 0)):  # B right, B wrong, C right, A wrong
        logits[row, lengths[row] - 1, metric.letter_ids[letter]] = 5.0
        logits[row, 0, metric.letter_ids[3]] = 9.0  # what stands elsewhere does not count
    metric.process(batch, [{"logits": logits}])
    found = metric.evaluate(4)
    assert found["mmlu_fs_val/abstract_algebra"] == 1
    assert found["mmlu_fs_val/professional_law"] == 0.5
    assert found["mmlu_fs_val/STEM"] == 0.5
    assert found["mmlu_fs_val/humanities"] == 0.5
    assert found["mmlu_fs_val/average"] == 0.5
    assert "mmlu_fs_val/other" not in found


def test_mmlu_has_57_subjects():
    names = [name for group in GROUPS.values() for name in group]
    assert len(names) == len(set(names)) == 57


def test_mmlu_refuses_answers_that_are_no_letters():
    metric = MMLUMetric(tokenizer=make_tokenizer())
    with pytest.raises(UserError, match="not 7"):
        metric.compute_metrics([("anatomy", "A", "7")])


def test_rewards():
    metric = RewardMetric()
    labels = torch.tensor([[-100, 0], [-100, 1], [-100, 0], [-100, 1]])
    rewards = torch.tensor([[9.0, 2.0], [9.0, 1.0], [9.0, 0.0], [9.0, 3.0]])
    metric.process({"data": {"labels": labels}}, [{"rewards": rewards}])
    assert metric.evaluate(1) == {
        "accuracy": 0.5,
        "chosen_score_mean": 1.0,
        "rejected_score_mean": 2.0,
    }


def test_boxes():
    assert intersection_over_union((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(50 / 150)
    assert intersection_over_union((0, 0, 10, 10), (20, 20, 30, 30)) == 0
    assert read_box("{<12><3><50><99>}") == [12, 3, 50, 99]
    assert read_box("the 3 boxes") is None
    answers = ["{<0><0><10><10>}", "{<0><0><10><4>}", "nothing"]
    assert accuracy(answers, [(0, 0, 10, 9), (0, 0, 10, 10), (0, 0, 1, 1)]) == pytest.approx(1 / 3)


def test_boxes_are_hundredths_of_the_square(tmp_path):
    row = {"image": "a.png", "width": 200, "height": 100, "bbox": [0, 0, 100, 100], "sents": ["x"]}
    assert box_text(row, square=False) == "{<0><0><50><100>}"
    assert box_text(row, square=True) == "{<0><25><50><75>}"
    import json

    file = tmp_path / "rows.json"
    file.write_text(json.dumps([row, {**row, "sents": ["y", "z"]}]), "utf-8")
    questions = RefCOCOJsonEvalDataset(str(file)).rows
    assert [question["text"] for question in questions] == ["x", "y", "z"]
    assert questions[0]["box"] == [0, 25, 50, 75]
    file.write_text(json.dumps([row, {"image": "b"}, {**row, "bbox": [5, 5, 5, 9]}]), "utf-8")
    with pytest.raises(UserError, match=r"1: no width.*\n2: empty bbox"):
        read_boxes(str(file))


def image_text():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_mmbench_counts_questions_right_in_every_order(tmp_path):
    file = tmp_path / "mmbench.tsv"
    names = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
    rows = [
        [1, "color?", "look", "red", "blue", "", "", "A", "color", image_text()],
        [1000001, "color?", "", "blue", "red", "", "", "B", "color", image_text()],
        [2, "shape?", "", "round", "square", "long", "flat", "C", "shape", image_text()],
    ]
    lines = ["\t".join(map(str, row)) for row in [names, *rows]]
    file.write_text("\n".join(lines) + "\n", "utf-8")
    questions = read_questions(str(file))
    assert question_text(questions[0]).splitlines() == [
        "look",
        "color?",
        "A. red",
        "B. blue",
        "Answer with the option's letter from the given choices directly.",
    ]
    said = ["A. red", "A", "The answer is C"]
    answered = [{**row, "prediction": text} for row, text in zip(questions, said, strict=True)]
    assert scores(answered) == {"Average": 0.5, "color": 0.0, "shape": 1.0}
    answered[1]["prediction"] = "B"
    assert scores(answered)["Average"] == 1
    assert letter_in("no idea") == ""


def test_a_file_that_is_no_mmbench_is_refused(tmp_path):
    file = tmp_path / "x.tsv"
    file.write_text("a\tb\n1\t2\n", "utf-8")
    with pytest.raises(UserError, match="no index, question"):
        read_questions(str(file))
