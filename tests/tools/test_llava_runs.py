"""LLaVA as typed: pretrain, fine-tune on red and blue squares, convert, ask about a picture."""

import base64
import contextlib
import io
import json
import random

import pytest
import torch
from openpyxl import load_workbook
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from tests.e2e.test_printed_commands import run_printed
from tests.helpers.forked import run_ranks
from tests.helpers.tiny import save_tiny
from tests.helpers.vision_language import save_clip, save_square
from xtuner.config import load_config
from xtuner.dataset import LLaVADataset
from xtuner.entry_point import main
from xtuner.evaluation.boxes import accuracy
from xtuner.registry import BUILDER
from xtuner.utils.errors import UserError

COLORS = {"red": (220, 20, 20), "blue": (20, 20, 220)}
QUESTION = "<image>\nWhat is the capital color?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("我的 llava")
    save_tiny(folder / "llm", initializer_range=0.2)
    save_clip(folder / "clip")
    rows = []
    draw = random.Random(0)
    for number in range(16):
        name = "red" if number % 2 else "blue"
        color = tuple(min(255, max(0, value + draw.randint(-20, 20))) for value in COLORS[name])
        save_square(folder / "images" / f"{number}.png", color)
        answer = {"from": "gpt", "value": name}
        ask = {"from": "human", "value": QUESTION}
        rows.append({"image": f"{number}.png", "conversations": [ask, answer]})
    rows.append(
        {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "yes"}]}
    )
    (folder / "rows.json").write_text(json.dumps(rows), "utf-8")
    return folder


def options(folder, *more):
    return [
        f"llm_name_or_path={folder / 'llm'}",
        f"visual_encoder_name_or_path={folder / 'clip'}",
        f"data_path={folder / 'rows.json'}",
        f"image_folder={folder / 'images'}",
        "batch_size=4",
        "accumulative_counts=1",
        "dataloader_num_workers=0",
        "max_length=64",
        "evaluation_images=" + str(folder / "images" / "1.png"),
        *more,
    ]


PRETRAIN = "llava_vicuna_7b_v15_clip_vit_large_p14_336_e1_gpu8_pretrain"
HF = ["--save-format", "huggingface", "--fp32"]
FINETUNE = "llava_vicuna_7b_v15_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune"


@pytest.fixture(scope="module")
def printed():
    """What the training of both stages printed; filled by ``trained``."""
    return io.StringIO()


@pytest.fixture(scope="module")
def trained(folder, printed):
    first = folder / "pretrain"
    words = options(folder, "max_epochs=5", "lr=1e-2")
    seeded = ["--seed", "0", "--cfg-options"]
    assert main(["train", PRETRAIN, "--work-dir", str(first), *seeded, *words]) == 0
    (checkpoint,) = first.glob("iter_*.pth")
    second = folder / "finetune"
    words = options(folder, f"pretrained_pth={checkpoint}", "max_epochs=12", "lr=4e-3")
    with contextlib.redirect_stdout(printed):
        assert main(["train", FINETUNE, "--work-dir", str(second), *seeded, *words]) == 0
    return first, second


def losses(work_dir):
    lines = (work_dir / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines if "loss" in line]


def test_both_stages_lower_the_loss(trained):
    for work_dir in trained:
        found = losses(work_dir)
        assert sum(found[-5:]) < 0.8 * sum(found[:5])


def ask(folder, parts, color, monkeypatch, capsys):
    picture = save_square(folder / f"{color}.png", COLORS[color])
    monkeypatch.setattr("sys.stdin", io.StringIO("What is the capital color?\nexit\n"))
    words = ["chat", str(folder / "llm"), "--llava", str(parts), "--image", str(picture)]
    words += ["--visual-encoder", str(folder / "clip"), "--prompt-template", "vicuna"]
    assert main([*words, "--temperature", "0", "--max-new-tokens", "4"]) == 0
    return capsys.readouterr().out


def test_chat_tells_red_from_blue(folder, trained, printed, monkeypatch, capsys):
    typed = QUESTION.replace("\n", " ") + "\nexit\n"  # a typed mark is not a second image
    convert, chat = run_printed(printed.getvalue(), typed).values()
    assert "wrote" in convert and "assistant: red" in chat
    parts = trained[1] / "hf"
    assert {path.name for path in parts.iterdir()} >= {
        "llm_adapter",
        "projector",
        "visual_encoder_adapter",
    }
    for color in COLORS:
        assert color in ask(folder, parts, color, monkeypatch, capsys)


def test_stock_transformers_tells_red_from_blue(folder, trained):
    (checkpoint,) = trained[1].glob("iter_*.pth")  # of a model in 4 bits
    out = folder / "hf"
    assert main(["convert", "pth_to_hf", str(checkpoint), str(out), *HF]) == 0
    model = LlavaForConditionalGeneration.from_pretrained(out, dtype=torch.float32)
    assert getattr(model.config.text_config, "quantization_config", None) is None
    processor = AutoProcessor.from_pretrained(out)
    messages = [{"role": "user", "content": QUESTION}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    for name, color in COLORS.items():
        picture = Image.open(save_square(folder / f"{name}.png", color))
        inputs = processor(images=picture, text=text, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        shown = processor.tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :])
        assert name in shown


def test_an_evaluation_image_that_is_missing_is_said(folder, caplog):
    cfg = load_config(PRETRAIN, options(folder, "evaluation_images=http://127.0.0.1:9/x.png"))
    (settings,) = (hook for hook in cfg.custom_hooks if "evaluation_images" in hook)
    hook = BUILDER.build(settings)
    assert hook._askable() == []
    assert "x.png cannot be read" in caplog.text
    good, bad = str(folder / "images" / "1.png"), str(folder / "none.png")
    hook = BUILDER.build({**settings, "evaluation_images": [good, bad]})
    assert hook._askable() == [0]


def dataset(folder, rows, **settings):
    (folder / "other.json").write_text(json.dumps(rows), "utf-8")
    cfg = load_config(PRETRAIN, options(folder))
    return BUILDER.build(
        {
            **cfg.train_dataloader.dataset,
            "data_path": str(folder / "other.json"),
            **settings,
        }
    )


def test_bad_images_are_named_and_left_out(folder, caplog):
    good = json.loads((folder / "rows.json").read_text("utf-8"))[:2]
    bad = []
    for number in range(25):
        bad.append({**good[0], "image": f"missing_{number}.png"})
        (folder / "images" / f"no_image_{number}.png").write_text("text", "utf-8")
        bad.append({**good[0], "image": f"no_image_{number}.png"})
    made = dataset(folder, [*bad[:25], *good, *bad[25:]])
    assert isinstance(made, LLaVADataset)
    assert len(made) == 2
    for row in bad:
        assert row["image"] in caplog.text
    with pytest.raises(UserError, match="50 rows are broken, or their images are"):
        dataset(folder, [*bad, *good], bad_images="error")


def test_more_places_than_images_are_named(folder, caplog):
    good = json.loads((folder / "rows.json").read_text("utf-8"))[0]
    without = {"conversations": good["conversations"]}
    assert len(dataset(folder, [without, good])) == 1
    assert "1 <image> in the text, 0 images" in caplog.text


def test_an_image_that_breaks_off_is_not_trained_on(folder, caplog):
    file = folder / "images" / "cut.png"
    Image.effect_noise((64, 64), 80).convert("RGB").save(file)
    file.write_bytes(file.read_bytes()[:1500])
    good = json.loads((folder / "rows.json").read_text("utf-8"))[0]
    made = dataset(folder, [{**good, "image": "cut.png"}])
    row = made[0]
    assert set(row["labels"]) == {-100}
    assert row["pixel_values"].shape == (1, 3, 32, 32)
    assert "cut.png is broken" in caplog.text
    with pytest.raises(UserError, match="is broken"):
        dataset(folder, [{**good, "image": "cut.png"}], bad_images="error")[0]


def test_rows_group_by_modality(folder):
    cfg = load_config(PRETRAIN, options(folder))
    lengths = BUILDER.build(cfg.train_dataloader.dataset).modality_length
    assert sum(length > 0 for length in lengths) == 16
    assert sum(length < 0 for length in lengths) == 1


def test_chat_without_an_image_is_one_message(folder, capsys):
    assert main(["chat", str(folder / "llm"), "--image", "x.png"]) == 1
    assert "takes no images" in capsys.readouterr().err
    assert main(["chat", str(folder / "llm"), "--llava", str(folder), "--image", "x.png"]) == 1
    assert "needs a template" in capsys.readouterr().err


def test_a_batch_is_what_the_model_needs(folder):
    cfg = load_config(PRETRAIN, options(folder))
    made = BUILDER.build(cfg.train_dataloader.dataset)
    batch = cfg.train_dataloader.collate_fn.type([made[0], made[16], made[1]])["data"]
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    assert (batch["input_ids"] == -200).sum() == 2
    assert torch.isfinite(BUILDER.build(cfg.model)(batch)["loss"])


@pytest.fixture(scope="module")
def parts(folder, trained):
    (checkpoint,) = trained[1].glob("iter_*.pth")
    out = folder / "evaluated"
    assert main(["convert", "pth_to_hf", str(checkpoint), str(out)]) == 0
    return out


def words_of(folder, parts, data):
    return [
        str(folder / "llm"),
        "--llava",
        str(parts),
        "--visual-encoder",
        str(folder / "clip"),
        "--prompt-template",
        "vicuna",
        "--max-new-tokens",
        "4",
        "--data-path",
        str(data),
    ]


def test_mmbench_writes_answers_and_scores(folder, parts, tmp_path, capsys):
    header = ["index", "question", "A", "B", "answer", "category", "image"]
    lines = ["\t".join(header)]
    for number, name in enumerate(COLORS):
        picture = save_square(tmp_path / f"{name}.png", COLORS[name])
        text = base64.b64encode(picture.read_bytes()).decode()
        lines.append("\t".join([str(number), "What color?", "red", "blue", "A", name, text]))
    data = tmp_path / "questions.tsv"
    data.write_text("\n".join(lines) + "\n", "utf-8")
    words = words_of(folder, parts, data)
    assert main(["mmbench", *words, "--work-dir", str(tmp_path / "one")]) == 0
    results = json.loads((tmp_path / "one" / "mmbench_result.json").read_text("utf-8"))
    found = json.loads((tmp_path / "one" / "mmbench_score.json").read_text("utf-8"))
    right = ["A" in row["prediction"] for row in results]
    assert found["Average"] == sum(right) / 2
    sheet = load_workbook(tmp_path / "one" / "mmbench_result.xlsx").active
    assert sheet["A2"].value == "0"
    assert "image" not in [cell.value for cell in sheet[1]]
    words += ["--work-dir", str(tmp_path / "two"), "--launcher", "pytorch"]
    run_ranks(2, "-m", "xtuner", "mmbench", *words)
    again = json.loads((tmp_path / "two" / "mmbench_result.json").read_text("utf-8"))
    assert again == results


def test_eval_refcoco_scores_what_the_model_says(folder, parts, tmp_path, capsys):
    picture = save_square(tmp_path / "red.png", COLORS["red"])
    row = {"width": 40, "height": 24, "bbox": [0, 0, 20, 24], "sents": ["a", "b"]}
    data = tmp_path / "boxes.json"
    data.write_text(json.dumps([{"image": picture.name, **row}]), "utf-8")
    words = [*words_of(folder, parts, data), "--work-dir", str(tmp_path / "out")]
    assert main(["eval_refcoco", *words, "--image-folder", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "out" / "refcoco_result.json").read_text("utf-8"))
    assert len(result["rows"]) == 2
    assert result["accuracy"] == accuracy(
        [row["answer"] for row in result["rows"]], [row["box"] for row in result["rows"]]
    )
    words[words.index("--work-dir") + 1] = str(tmp_path / "two")
    more = ["--image-folder", tmp_path, "--launcher", "pytorch"]
    run_ranks(2, "-m", "xtuner", "eval_refcoco", *words, *more)
    assert json.loads((tmp_path / "two" / "refcoco_result.json").read_text("utf-8")) == result
    assert main(["eval_refcoco", *words, "--image-folder", str(tmp_path / "none")]) == 1
    assert "1 images are bad" in capsys.readouterr().err


def test_boxes_become_conversations(folder):
    save_square(folder / "images" / "box.png", COLORS["red"])
    row = {"image": "box.png", "width": 40, "height": 24, "bbox": [0, 0, 20, 24], "sents": ["it"]}
    data = folder / "boxes.json"
    data.write_text(json.dumps([row]), "utf-8")
    name = f"{FINETUNE}_refcoco"
    words = [*options(folder), f"refcoco_path={data}"]
    cfg = load_config(name, [word for word in words if not word.startswith("data_path")])
    tokenizer = BUILDER.build(cfg.tokenizer)
    asked = []
    for settings in (cfg.refcoco_dataset, cfg.inv_refcoco_dataset):
        sample = BUILDER.build(settings)[0]
        assert sample["pixel_values"].shape == (1, 3, 32, 32)
        shown = [token for token in sample["input_ids"] if token >= 0]
        asked.append(tokenizer.decode(shown))
    assert "[refer] give me the location of it" in asked[0]
    assert "{<0><20><50><80>}" in asked[0]
    assert "[identify] what is this {<0><20><50><80>}" in asked[1]


def test_the_hugging_face_form_is_written_by_the_command(folder, trained, tmp_path, capsys):
    (first,), (second,) = (work_dir.glob("iter_*.pth") for work_dir in trained)
    words = ["--save-format", "huggingface"]
    assert main(["convert", "pth_to_hf", str(first), str(tmp_path / "one"), *words]) == 0
    capsys.readouterr()
    assert main(["convert", "pth_to_hf", str(second), str(tmp_path / "two"), *words]) == 0
    assert "as the base has them" in capsys.readouterr().out
    cfg = load_config(str(first.parent / f"{PRETRAIN}.py"))  # in the dtype of this machine
    row = BUILDER.build(cfg.train_dataloader.dataset)[0]
    cfg.model.llm.quantization_config = None
    ours = BUILDER.build(cfg.model).float().eval()
    ours.load_state_dict(torch.load(first, weights_only=True)["state_dict"], strict=False)
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "one", dtype=torch.float32)
    image = theirs.config.image_token_index
    ids = [
        token
        for each in row["input_ids"]
        for token in ([image] * theirs.config.image_seq_length if each < 0 else [each])
    ]
    batch = cfg.train_dataloader.collate_fn.type([row])["data"]
    with torch.no_grad():
        expected = ours(batch, mode="tensor").logits
        found = theirs(input_ids=torch.tensor([ids]), pixel_values=row["pixel_values"]).logits
    size = min(expected.shape[-1], found.shape[-1])
    torch.testing.assert_close(found[..., :size], expected[..., :size], rtol=1e-3, atol=1e-3)
