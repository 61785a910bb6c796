"""``xtuner chat`` with InternVL, about an image and without one."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from tests.e2e.test_own_code import say
from tests.e2e.test_printed_commands import run_printed
from tests.helpers.tiny import save_tiny
from tests.helpers.tiny_internvl import save_internvl
from xtuner.chat.internvl import InternVLChat, InternVLPrompt
from xtuner.chat.prompt import Turn
from xtuner.dataset import InternVL_V1_5_Dataset
from xtuner.entry_point import main
from xtuner.model.transformers_models.auto import AutoModelForCausalLM, AutoTokenizer
from xtuner.utils import PROMPT_TEMPLATE

TEMPLATE = PROMPT_TEMPLATE.internlm2_chat


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("我的 internvl")
    save_internvl(folder / "base")
    Image.effect_noise((64, 32), 60).convert("RGB").save(folder / "image.png")
    row = '{"image": "image.png", "conversations": [{"from": "human", "value": "<image>\\ncolor?"}'
    row += ', {"from": "gpt", "value": "blue"}]}\n'
    (folder / "rows.jsonl").write_text(row, "utf-8")
    return folder


@pytest.fixture(scope="module")
def model(folder):
    loaded = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    chat = InternVLChat(loaded.eval(), tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"))
    chat.set_image(Image.open(folder / "image.png"))
    return chat, InternVLPrompt(tokenizer, TEMPLATE, chat=chat)


def test_prompt_and_tiles_are_those_of_training(folder, model):
    chat, prompt = model
    made = InternVL_V1_5_Dataset(
        model_path=str(folder / "base"),
        template=TEMPLATE,
        data_paths=str(folder / "rows.jsonl"),
        image_folders=str(folder),
        max_length=128,
    )
    row = made[0]
    asked = [token for token, label in zip(row["input_ids"], row["labels"], strict=True)][
        : next(place for place, label in enumerate(row["labels"]) if label != -100)
    ]
    assert prompt.ids([Turn("color?")]) == asked
    torch.testing.assert_close(chat.pixels, row["pixel_values"])


def test_answers_depend_on_the_image(model):
    chat, prompt = model
    ids = torch.tensor([prompt.ids([Turn("color?")])])
    settings = {"max_new_tokens": 1, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    answer = chat.generate(ids, **settings)
    assert torch.equal(answer[:, :-1], ids)
    whole = chat.model
    whole.img_context_token_id = chat.context_id
    assert int(answer[0, -1]) == int(whole(chat.pixels, ids).logits[0, -1].argmax())


def test_typed(folder, capsys, monkeypatch):
    base, image = str(folder / "base"), str(folder / "image.png")
    for extra in (["--image", image], []):
        monkeypatch.setattr("sys.stdin", io.StringIO("color?\nand now?\nexit\n"))
        words = ["chat", base, "--prompt-template", "internlm2_chat", "--max-new-tokens", "3"]
        assert main([*words, *extra]) == 0
        assert capsys.readouterr().out.count("assistant: ") == 2


def test_printed_commands_after_training(folder, capsys):
    options = [f"path={folder / 'base'}", f"data_path={folder / 'rows.jsonl'}"]
    options += [f"image_folder={folder}"]
    options += ["max_length=96", "dataloader_num_workers=0", "accumulative_counts=1"]
    name, work = "internvl_v2_internlm2_2b_lora_finetune", folder / "run"
    said = say(capsys, "train", name, "--work-dir", work, "--cfg-options", *options)
    *_, chat = run_printed(said, image=folder / "image.png").values()
    assert "assistant: " in chat


def test_an_image_needs_a_model_that_sees(folder, capsys):
    save_tiny(folder / "llama")
    words = ["chat", str(folder / "llama"), "--image", str(folder / "image.png")]
    assert main(words) == 1
    assert "takes no images" in capsys.readouterr().err
