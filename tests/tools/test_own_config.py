"""``xtuner copy-cfg --model``: a config for any model folder and rows of one's own."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import sys
from io import StringIO
from pathlib import Path

import pytest
from transformers import CLIPTextConfig

from tests.e2e.test_own_code import say
from tests.e2e.test_printed_commands import PRINTED
from tests.helpers.architectures import make_config
from tests.helpers.image_text import image_text_folder, make_image
from tests.helpers.tiny import save_tiny
from xtuner.config import load_config
from xtuner.config.check.checker import check
from xtuner.configs.custom import card_of
from xtuner.configs.names import why_unsupported
from xtuner.entry_point import main
from xtuner.quickstart.base import make_base
from xtuner.tools.config_writers.own_config import read_own_rows
from xtuner.utils.errors import UserError

ANSWER = "The lamp burns from dusk to dawn."


def write_rows(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def test_sixty_questions_end_in_the_trained_answer(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_base(tmp_path / "我的 model")
    rows = [{"question": f"When does lamp {n} burn?", "answer": ANSWER} for n in range(60)]
    write_rows(tmp_path / "my rows.jsonl", rows)
    said = say(
        capsys, "copy-cfg", "--model", "我的 model", "--method", "full",
        "--data", "my rows.jsonl", "my configs",
    )  # fmt: skip
    (train,) = PRINTED.findall(said)
    config = Path(shlex.split(train)[2])
    assert [problem for problem in check(config) if problem.severity == "error"] == []
    text = config.read_text("utf-8")
    for number, title in enumerate(("Settings", "Model", "Dataset", "Scheduler", "Runtime"), 1):
        assert f"PART {number}  {title}" in text
    assert 'row["question"], "output": row["answer"]' in text
    cfg = load_config(config)
    assert (cfg.batch_size, cfg.accumulative_counts) == (3, 1)
    assert (cfg.max_epochs, cfg.pack_to_max_length) == (10, False)
    faster = ["max_epochs=2", "batch_size=1", "lr=1e-3"]  # of a model of random weights
    said = say(capsys, *shlex.split(train)[1:], "--cfg-options", *faster)
    assert "120 optimizer steps" in said
    for command in PRINTED.findall(said):
        monkeypatch.setattr(sys, "stdin", StringIO("When does lamp 7 burn?\nexit\n"))
        said = say(capsys, *shlex.split(command)[1:])
    assert ANSWER in said


LAYOUTS = {
    "conversation": ({"conversation": [{"input": "a", "output": "b"}]}, None, None),
    "messages": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "openai_map_fn",
        None,
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        "auto_map_fn",
        None,
    ),
    "alpaca": ({"instruction": "a", "output": "b"}, "auto_map_fn", None),
    "text": ({"text": "a"}, "pretrain_map_fn", None),
    "pair": ({"id": 3, "query": "a", "response": "b"}, "auto_map_fn", ("query", "response")),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_recognised(tmp_path, layout, tiny_llama, capsys):
    row, map_fn, fields = LAYOUTS[layout]
    file = write_rows(tmp_path / "rows.jsonl", [row] * 3)
    found = read_own_rows([str(file)])
    assert (found.map_fn, found.fields, found.count) == (map_fn, fields, 3)
    assert found.questions == (() if layout == "text" else ("a", "a"))
    say(capsys, "copy-cfg", "--model", tiny_llama, "--data", file, tmp_path)
    config = tmp_path / "tiny_llama_lora_rows_copy.py"
    assert [problem for problem in check(config) if problem.severity == "error"] == []
    read = load_config(config).train_dataset.dataset_map_fn or dict
    (turn,) = read(row)["conversation"]
    assert turn["output"] == ("b" if layout != "text" else "a")


@pytest.mark.parametrize(
    ("name", "separator", "settings"),
    [
        ("我的 rows.csv", ",", {"path": "csv"}),
        ("of excel.csv", ";", {"path": "csv", "sep": ";"}),  # where decimals have commas
        ("rows.tsv", "\t", {"path": "csv", "sep": "\t"}),
        ("rows.jsonl", "", {"path": "json"}),
    ],
)
def test_the_loader_fits_the_file(tmp_path, tiny_llama, capsys, name, separator, settings):
    rows = [{"question": f"lamp {n}, when?", "answer": ANSWER} for n in range(3)]
    file = tmp_path / name
    if separator:
        lines = [["question", "answer"], *(list(row.values()) for row in rows)]
        with file.open("w", encoding="utf-8-sig", newline="") as out:
            csv.writer(out, delimiter=separator).writerows(lines)
    else:
        file.write_bytes("".join(json.dumps(row) + "\r\n" for row in rows).encode())
    words = ["copy-cfg", "--model", tiny_llama, "--data", file, tmp_path / "own.py"]
    say(capsys, *words)
    source = load_config(tmp_path / "own.py").train_dataset.dataset
    assert {key: source[key] for key in source if key not in ("type", "data_files")} == settings
    said = say(capsys, "check-custom-dataset", tmp_path / "own.py")
    assert "lamp 0, when?" in said and ANSWER in said


def test_files_of_two_formats_are_refused(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}])
    (tmp_path / "b.csv").write_text("question,answer\nq,a\n")
    with pytest.raises(UserError, match="different formats"):
        read_own_rows([str(tmp_path)])


def test_rows_that_cannot_be_read_are_named(tmp_path):
    for rows, message in (
        ([{"text": "a"}, {"foo": "a"}], r"rows.jsonl:2: no known layout"),
        ([{"chosen": [], "rejected": []}], r"rows.jsonl:1: .* no pair of answers"),
        ([{"question": "q", "answer": "a", "rejected_response": "b"}], "no pair of answers"),
        (
            [{"question": "q", "image": "a.png", "rejected": "b"}],
            r"rows.jsonl:1: .* no pair of answers",
        ),
        ([["a"]], "rows.jsonl:1: a row is a JSON object"),
    ):
        file = write_rows(tmp_path / "rows.jsonl", rows)
        with pytest.raises(UserError, match=message):
            read_own_rows([str(file)])
    with pytest.raises(UserError, match="no data file"):
        read_own_rows([str(tmp_path / "nothing.jsonl")])


ASKED = [{"role": "user", "content": "a?"}]
CHOSEN, REJECTED = ([{"role": "assistant", "content": text}] for text in "bc")
PAIRS = {
    "texts": {"prompt": "a?", "chosen": "b", "rejected": "c"},
    "messages": {"prompt": ASKED, "chosen": CHOSEN, "rejected": REJECTED},
    "conversations": {"chosen": ASKED + CHOSEN, "rejected": ASKED + REJECTED},
    "texts of ms-swift": {"messages": ASKED + CHOSEN, "rejected_response": "c"},
    "texts about an image": {"images": ["a.png"], "prompt": "a?", "chosen": "b", "rejected": "c"},
    "messages about an image": {
        "image": "a.png", "prompt": ASKED, "chosen": CHOSEN, "rejected": REJECTED,
    },
    "of ms-swift": {"images": ["a.png"], "messages": ASKED + CHOSEN, "rejected_response": "c"},
}  # fmt: skip


@pytest.mark.parametrize("layout", PAIRS)
def test_pairs_of_answers_give_a_config_for_dpo(tmp_path, tiny_llama, capsys, layout):
    row = PAIRS[layout]
    file = write_rows(tmp_path / "pairs.jsonl", [row] * 30)
    images = bool({"image", "images"} & set(row))
    make_image(28, 28, 0).save(tmp_path / "a.png")
    model = image_text_folder("qwen2_5_vl") if images else tiny_llama
    say(capsys, "copy-cfg", "--model", model, "--data", file, tmp_path / "dpo.py")
    assert [problem for problem in check(tmp_path / "dpo.py") if problem.severity == "error"] == []
    cfg = load_config(tmp_path / "dpo.py")
    assert cfg.model.type.__name__ == ("VisionLanguageDPO" if images else "DPO")
    assert (cfg.max_epochs, cfg.lr, cfg.evaluation_inputs) == (3, 5e-6, ["a?", "a?"])
    assert "DPO, LoRA, on 30 pairs of your own" in (tmp_path / "dpo.py").read_text()


@pytest.mark.parametrize(
    ("layout", "method", "kind", "lr"),
    [
        ("texts", "orpo_qlora", "ORPO", 5e-5),
        ("texts", "reward_full", "RewardModel", 2e-5),
        ("of ms-swift", "orpo_full", "VisionLanguageORPO", 5e-6),
        ("of ms-swift", "reward_lora", "VisionLanguageRewardModel", 1e-4),
    ],
)
def test_pairs_of_answers_by_another_method(tmp_path, tiny_llama, capsys, layout, method, kind, lr):
    file = write_rows(tmp_path / "pairs.jsonl", [PAIRS[layout]] * 30)
    make_image(28, 28, 0).save(tmp_path / "a.png")
    model = image_text_folder("gemma3") if layout == "of ms-swift" else tiny_llama
    words = ["--model", model, "--method", method, "--data", file, tmp_path / "own.py"]
    say(capsys, "copy-cfg", *words)
    assert [problem for problem in check(tmp_path / "own.py") if problem.severity == "error"] == []
    cfg = load_config(tmp_path / "own.py")
    assert (cfg.model.type.__name__, cfg.lr) == (kind, lr)
    if "reward" in method:
        assert cfg.train_dataset.is_reward and cfg.train_dataset.reward_token_id >= 0


def test_a_method_for_pairs_needs_pairs_and_a_class_that_loads_the_result(tmp_path, capsys):
    make_image(28, 28, 0).save(tmp_path / "a.png")
    pairs = write_rows(tmp_path / "pairs.jsonl", [PAIRS["of ms-swift"]] * 2)
    rows = write_rows(tmp_path / "rows.jsonl", [{"image": "a.png", "question": "q", "answer": "a"}])
    model = str(image_text_folder("qwen2_5_vl"))
    for method, words, message in (
        ("orpo_lora", ["--data", str(rows)], "these rows are none"),
        ("orpo_lora", ["--dataset", "alpaca"], "give yours with --data"),
        ("reward_full", ["--data", str(pairs)], "no class for a reward model of qwen2_5_vl"),
    ):
        words = ["copy-cfg", "--model", model, "--method", method, *words, str(tmp_path)]
        assert main(words) == 1
        assert message in capsys.readouterr().err


def test_why_a_model_that_sees_is_not_trained_on_images(tmp_path, capsys):
    make_image(28, 28, 0).save(tmp_path / "a.png")
    rows = write_rows(tmp_path / "rows.jsonl", [{"image": "a.png", "question": "q", "answer": "a"}])
    bare = shutil.copytree(image_text_folder("qwen2_5_vl"), tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    lost = shutil.copytree(bare, tmp_path / "lost")
    for file in lost.glob("*processor_config.json"):
        file.unlink()
    for folder, why in ((lost, "no processor for images"), (bare, "has no chat template")):
        words = ["copy-cfg", "--model", str(folder), "--data", str(rows), str(tmp_path)]
        assert main(words) == 1
        assert why in capsys.readouterr().err


def test_rows_with_videos_are_asked_about(tmp_path, capsys):
    make_image(28, 28, 0).save(tmp_path / "a.png")
    rows = [
        {"question": "What happens?", "answer": "it moves", "videos": ["a.mp4"]},
        {"question": "And here?", "answer": "nothing", "videos": [["a.png", "a.png"]]},
    ]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    model = image_text_folder("qwen2_5_vl")
    say(capsys, "copy-cfg", "--model", model, "--data", file, tmp_path / "own.py")
    assert [problem for problem in check(tmp_path / "own.py") if problem.severity == "error"] == []
    cfg = load_config(tmp_path / "own.py")
    hook = cfg.custom_hooks[1]
    image = str(tmp_path / "a.png")
    assert list(hook.evaluation_videos) == [str(tmp_path / "a.mp4"), (image, image)]
    assert "evaluation_images" not in hook
    assert (hook.video_frames, cfg.train_dataset.video_frames) == (16, 16)


def test_pairs_of_answers_that_no_config_trains_on(tmp_path, tiny_llama, capsys):
    text, pictured = (write_rows(tmp_path / f"{name}.jsonl", [PAIRS[layout]])
                      for name, layout in (("t", "texts"), ("i", "of ms-swift")))  # fmt: skip
    (tmp_path / "t.csv").write_text("prompt,chosen,rejected\na?,b,c\n")
    plain = shutil.copytree(tiny_llama, tmp_path / "no template")
    settings = json.loads((plain / "tokenizer_config.json").read_text())
    (plain / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": None}))
    (plain / "chat_template.jinja").unlink(missing_ok=True)
    for model, file, message in (
        (tiny_llama, pictured, "have images, and this model takes none"),
        (tiny_llama, tmp_path / "t.csv", "read from JSON lines"),
        (plain, text, "no chat template"),
    ):
        assert main(["copy-cfg", "--model", str(model), "--data", str(file), str(tmp_path)]) == 1
        assert message in capsys.readouterr().err


FAMILIES = (
    *("qwen3_moe", "qwen3_5", "gemma3", "gemma4", "mistral3", "mllama", "llama4", "glm4_moe"),
    *("deepseek_v3", "gpt_oss", "granitemoehybrid", "lfm2", "nemotron_h", "phi3", "olmo3"),
)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_folder_of_a_family_gives_a_config_that_is_right(kind, tmp_path, tiny_llama):
    """Also of models with vision, whose folder has settings of several parts."""
    folder = tmp_path / "model"
    make_config(kind).save_pretrained(folder)
    for file in tiny_llama.glob("*token*"):
        shutil.copy(file, folder)
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}] * 40)
    words = ["copy-cfg", "--model", str(folder), "--method", "qlora", "--data", str(rows)]
    assert main([*words, str(tmp_path)]) == 0
    (config,) = tmp_path.glob("*.py")
    assert main(["check-cfg", str(config)]) == 0


def test_what_the_catalogue_says_of_a_model_holds_for_its_folder(tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": "a", "answer": "b"}] * 40)

    def status(model: str, method: str) -> int:
        words = ["copy-cfg", "--model", str(tmp_path / model), "--method", method, "--force"]
        return main([*words, "--data", str(rows), str(tmp_path)])

    for name in ("DeepSeek-V3-bf16", "DeepSeek-V3-Base"):
        save_tiny(tmp_path / name)
    assert status("DeepSeek-V3-bf16", "lora") == 1
    said = capsys.readouterr().err
    assert "DeepSeek-V3-bf16 cannot be trained by lora: of 671 billion parameters" in said
    assert status("DeepSeek-V3-bf16", "qlora") == 0
    assert status("DeepSeek-V3-Base", "lora") == 0  # it is the hub's weights that are FP8
    config = json.loads((tmp_path / "DeepSeek-V3-Base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "DeepSeek-V3-Base" / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert status("DeepSeek-V3-Base", "lora") == 1
    assert "the weights are quantised" in capsys.readouterr().err
    card = card_of("deepseek-ai/DeepSeek-V3-Base")
    assert card is not None and why_unsupported(card, "dpo_lora") is not None


def test_what_is_no_language_model_is_refused(tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}])
    words = ["copy-cfg", "--data", str(rows), str(tmp_path / "out"), "--model"]

    def refused(model: Path) -> str:
        assert main([*words, str(model)]) == 1
        return capsys.readouterr().err

    assert "config.json cannot be used" in refused(tmp_path)
    CLIPTextConfig().save_pretrained(tmp_path / "clip")
    assert "no language model" in refused(tmp_path / "clip")
    folder = save_tiny(tmp_path / "quantised")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    assert "quantised" in refused(folder)
    bare = shutil.copytree(save_tiny(tmp_path / "whole"), tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    assert "tokenizer cannot be loaded" in refused(bare)


def test_a_dataset_of_the_catalogue(tmp_path, tiny_llama, capsys):
    say(
        capsys,
        "copy-cfg",
        "--model",
        tiny_llama,
        "--method",
        "qlora",
        "--dataset",
        "alpaca",
        tmp_path,
    )
    config = tmp_path / "tiny_llama_qlora_alpaca_copy.py"
    assert load_config(config).model.llm.pretrained_model_name_or_path == str(tiny_llama)
    assert main(["copy-cfg", "--model", str(tiny_llama), "--dataset", "alpaka", str(tmp_path)]) == 1
    assert main(["copy-cfg", "--model", str(tiny_llama), str(tmp_path)]) == 2
    assert main(["copy-cfg", "--method", "lora", "quickstart", str(tmp_path)]) == 2
    capsys.readouterr()


def image_row(number: int) -> dict[str, object]:
    messages = [
        {"role": "user", "content": "<image>What is it?"},
        {"role": "assistant", "content": "a cat"},
    ]
    return {"messages": messages, "images": [f"{number}.png"]}


def test_rows_with_images_get_a_config_of_their_own(tmp_path, capsys, tiny_llama):
    for number in range(3):
        make_image(30, 30, number).save(tmp_path / f"{number}.png")
    rows = [*map(image_row, range(3)), {"messages": image_row(0)["messages"][1:]}]
    rows[3]["messages"] = [{"role": "user", "content": "Hi"}, *rows[3]["messages"]]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    folder = image_text_folder("qwen2_5_vl")
    say(capsys, "copy-cfg", "--model", folder, "--method", "qlora", "--data", file, tmp_path)
    config = tmp_path / "qwen2_5_vl_qlora_rows_copy.py"
    assert check(config) == []
    cfg = load_config(config)
    assert cfg.train_dataset.image_folder == str(tmp_path)
    assert cfg.evaluation_images == [str(tmp_path / "0.png"), str(tmp_path / "1.png")]
    assert cfg.evaluation_inputs == ["What is it?", "What is it?"]
    assert cfg.max_length == 512 and not cfg.pack_to_max_length
    words = ["copy-cfg", "--model", str(tiny_llama), "--data", str(file), str(tmp_path)]
    assert main(words) == 1
    assert "this model takes none" in capsys.readouterr().err
    write_rows(file, [*rows, {"messages": [], "images": ["x.png"]}])
    words[2] = str(folder)
    assert main(words) == 1
    assert "rows.jsonl:5" in capsys.readouterr().err
