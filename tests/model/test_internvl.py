"""InternVL: equal to the plain computation; every config builds."""

import json

import pytest
import torch
from peft import LoraConfig
from PIL import Image

from tests.helpers.tiers import few_fast
from tests.helpers.tiny import save_tiny
from tests.helpers.tiny_internvl import LANGUAGE_MODELS, save_internvl
from tests.helpers.vision_language import save_square
from xtuner import configs
from xtuner.config import load_config
from xtuner.dataset import InternVL_V1_5_Dataset
from xtuner.dataset.collate_fns import default_collate_fn
from xtuner.model import InternVL_V1_5
from xtuner.model.transformers_models.auto import AutoModel
from xtuner.registry import BUILDER
from xtuner.utils import PROMPT_TEMPLATE
from xtuner.utils.errors import UserError

NAMES = [name for name in configs.names() if name.startswith("internvl_")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("internvl")
    for kind in LANGUAGE_MODELS:
        save_internvl(folder / kind, kind)
    (folder / "base").symlink_to(folder / "internlm2")
    rows = []
    for number, size in enumerate([(64, 32), (32, 32)]):
        save_square(folder / "images" / f"{number}.png", "red")
        Image.new("RGB", size, "blue").save(folder / "images" / f"{number}.png")
        talk = [{"from": "human", "value": "<image>\ncolor?"}, {"from": "gpt", "value": "blue"}]
        rows.append({"image": f"{number}.png", "conversations": talk})
    rows.append(
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}
    )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder


def dataset(folder, **settings):
    return InternVL_V1_5_Dataset(
        model_path=str(folder / "base"),
        template=PROMPT_TEMPLATE.internlm2_chat,
        data_paths=str(folder / "rows.jsonl"),
        image_folders=str(folder / "images"),
        **{"max_length": 128, **settings},
    )


def test_loss_and_gradients_equal_the_plain_computation(folder):
    model = InternVL_V1_5(str(folder / "base")).float()
    made = dataset(folder)
    batch = default_collate_fn([made[0], made[1]])["data"]
    loss = model(batch)["loss"]
    loss.backward()
    found = model.projector[1].weight.grad.clone()
    whole = AutoModel.from_pretrained(folder / "base", dtype=torch.bfloat16).float()
    total, count = 0.0, 0
    for row in (made[0], made[1]):
        ids = torch.tensor([row["input_ids"]])
        embedded = whole.language_model.get_input_embeddings()(ids).clone()
        embedded[ids == made.marks[1]] = whole.extract_feature(row["pixel_values"]).flatten(0, 1)
        logits = whole.language_model(inputs_embeds=embedded).logits[0, :-1]
        goal = torch.tensor(row["labels"][1:])
        total += torch.nn.functional.cross_entropy(logits, goal, reduction="sum")
        count += int((goal != -100).sum())
    (total / count).backward()
    torch.testing.assert_close(loss, total / count, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, whole.mlp1[1].weight.grad, rtol=1e-3, atol=1e-5)


def test_there_are_all_published_ones():
    assert len(NAMES) == 21


@pytest.mark.parametrize("name", few_fast(NAMES, NAMES[::4]))
def test_every_config_builds_and_takes_a_step(name, folder):
    kind = "phi3" if "phi3" in name else "internlm2"
    cfg = load_config(
        name,
        [
            f"path={folder / kind}",
            f"data_path={folder / 'rows.jsonl'}",
            f"image_folder={folder / 'images'}",
            "max_length=96",
        ],
    )
    made = BUILDER.build(cfg.train_dataloader.dataset)
    batch = cfg.train_dataloader.collate_fn.type([made[0], made[2]])
    model = BUILDER.build(cfg.model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch)["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    trained = {n.partition(".")[0] for n, w in model.named_parameters() if w.grad is not None}
    assert {"projector", "llm"} <= trained
    assert all(name.partition(".")[0] in trained for name in model.state_dict())


def test_the_converted_model_computes_the_same(folder, tmp_path):
    lora = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, task_type="CAUSAL_LM")
    model = InternVL_V1_5(
        str(folder / "base"), freeze_llm=True, freeze_visual_encoder=True, llm_lora=lora
    ).float()
    model.to_hf(tmp_path / "out")
    whole = AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    row = dataset(folder)[0]
    with torch.no_grad():
        expected = model.eval()(default_collate_fn([row])["data"], mode="tensor").logits
        ids = torch.tensor([row["input_ids"]])
        embedded = whole.language_model.get_input_embeddings()(ids)
        places = ids == model.context_id
        embedded[places] = whole.extract_feature(row["pixel_values"]).flatten(0, 1)
        found = whole.language_model(inputs_embeds=embedded).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_every_file_beside_the_weights_is_carried_over(folder, tmp_path):
    base = folder / "base"
    names = {"conversation.py", "tokenizer.model", "preprocessor_config.json"}
    for name in names:
        (base / name).write_text(name)
    try:
        InternVL_V1_5(str(base)).to_hf(tmp_path / "out", dtype=torch.float16)
    finally:
        for name in names:
            (base / name).unlink()
    for name in names:
        assert (tmp_path / "out" / name).read_text() == name
    before, after = (json.loads((f / "config.json").read_text()) for f in (base, tmp_path / "out"))
    assert after == before | {"torch_dtype": "float16"}


def test_a_model_of_another_kind_is_refused(tmp_path):
    save_tiny(tmp_path)
    with pytest.raises(UserError, match="llama"):
        InternVL_V1_5(str(tmp_path))


def test_a_quantised_part_needs_an_adapter(folder):
    with pytest.raises(UserError, match="llm is quantised"):
        InternVL_V1_5(str(folder / "base"), quantization_llm=True)
