"""LLaVA equals plain transformers' LLaVA in loss and gradients, packed or not, in all its forms."""

import copy

import pytest
import torch
from mmengine.logging import HistoryBuffer
from peft import LoraConfig, PeftModel
from transformers import AutoModel, AutoModelForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from tests.helpers.fake_gpu import Waits
from tests.helpers.tiny import make_model, make_tokenizer
from tests.helpers.vision_language import PATCHES, SIZE, make_clip
from xtuner.dataset.collate_fns import default_collate_fn
from xtuner.model import LLaVAModel, llava
from xtuner.proving.training import plain_training
from xtuner.utils.errors import UserError

IMAGE = -200
LORA = dict(r=4, lora_alpha=8)


def make(**settings):
    torch.manual_seed(0)
    llm, encoder = make_model("llama"), make_clip()
    return LLaVAModel(llm=llm, visual_encoder=encoder, **settings)


def rows():
    torch.manual_seed(3)
    pictures = torch.randn(3, 3, SIZE, SIZE)
    texts = [[IMAGE, 7, 8, 9, 10, 11], [4, 5, 6], [3, IMAGE, 9, IMAGE, 12, 13, 14]]
    made = []
    for ids in texts:
        labels = [token if place > 2 else -100 for place, token in enumerate(ids)]
        labels = [
            -100 if token == IMAGE else label for token, label in zip(ids, labels, strict=True)
        ]
        made.append({"input_ids": ids, "labels": labels})
    made[1]["labels"] = [-100, 5, 6]
    made[0]["pixel_values"] = pictures[0]
    made[2]["pixel_values"] = pictures[1:]
    return made


def plain(model):
    """transformers' own LLaVA with the same weights, its image token at id 500."""
    config = LlavaConfig(
        text_config=model.llm.config,
        vision_config=model.visual_encoder.config,
        image_token_index=500,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=PATCHES,
    )
    torch.manual_seed(0)
    theirs = LlavaForConditionalGeneration(config)
    theirs.model.language_model.load_state_dict(model.llm.model.state_dict())
    theirs.lm_head.load_state_dict(model.llm.lm_head.state_dict())
    tower = theirs.model.vision_tower
    weights = model.visual_encoder.state_dict().values()
    tower.load_state_dict(dict(zip(tower.state_dict(), weights, strict=True)))
    for ours, name in ((0, "linear_1"), (2, "linear_2")):
        layer = getattr(theirs.model.multi_modal_projector, name)
        layer.load_state_dict(model.projector.model[ours].state_dict())
    return theirs


def as_theirs(row):
    """A row with a token for each patch of an image."""
    ids, labels = [], []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        times = PATCHES if token == IMAGE else 1
        ids += [500 if token == IMAGE else token] * times
        labels += [label] * times
    pixels = row.get("pixel_values")
    pixels = None if pixels is None else pixels.reshape(-1, 3, SIZE, SIZE)
    return {
        "labels": labels,
        "batch": {"input_ids": torch.tensor([ids]), "pixel_values": pixels},
    }


@pytest.mark.parametrize("packed", [False, True])
def test_loss_and_gradients_equal_transformers(packed):
    ours = make(use_varlen_attn=packed)
    theirs = plain(ours)
    batch = default_collate_fn(rows(), use_varlen_attn=packed)["data"]
    loss = ours(batch)["loss"]
    loss.backward()
    expected = plain_training(theirs, list(map(as_theirs, rows())), lambda row: row["batch"])
    assert loss.item() == pytest.approx(expected.loss, rel=1e-4)
    pairs = [
        (ours.projector.model[0], theirs.model.multi_modal_projector.linear_1),
        (
            ours.llm.model.layers[0].self_attn.q_proj,
            theirs.model.language_model.layers[0].self_attn.q_proj,
        ),
        (ours.llm.lm_head, theirs.lm_head),
    ]
    for mine, other in pairs:
        torch.testing.assert_close(mine.weight.grad, other.weight.grad, rtol=1e-3, atol=1e-5)
    patch = next(w for n, w in ours.visual_encoder.named_parameters() if "patch_embedding" in n)
    other = next(
        w for n, w in theirs.model.vision_tower.named_parameters() if "patch_embedding" in n
    )
    torch.testing.assert_close(patch.grad, other.grad, rtol=1e-3, atol=1e-5)
    assert ours.num_items(batch)["tokens"] == 3 + 2 + 3


def test_left_padding_changes_nothing():
    ours = make()
    batch = default_collate_fn(rows())["data"]
    left = {key: value.clone() for key, value in batch.items() if torch.is_tensor(value)}
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        for key in ("input_ids", "labels", "attention_mask"):
            left[key][row] = batch[key][row].roll(-length)
    torch.testing.assert_close(
        ours(batch)["loss"], ours(left, num_items_in_batch=ours.num_items(batch))["loss"]
    )


@pytest.mark.parametrize("packed", [False, True])
def test_image_tokens_found_before_a_gpu_has_the_batch_give_the_same(packed, monkeypatch):
    """``forward`` then asks the device only where there is a loss."""
    model = make(use_varlen_attn=packed)
    batch = default_collate_fn(rows(), use_varlen_attn=packed)["data"]
    expected = model(batch)["loss"]
    with Waits() as waits:
        model(batch)
    assert any("images.py" in line for line in waits.found)
    monkeypatch.setattr(llava, "waits_for", lambda device: True)
    prepared = model.prepare_batch(batch, torch.device("cuda"))
    with Waits() as waits:
        assert torch.equal(model(prepared)["loss"], expected)
    assert not any("images.py" in line for line in waits.found)


def test_a_batch_without_images_gives_every_trained_weight_a_gradient():
    ours = make(freeze_llm=True, visual_encoder_lora=LoraConfig(**LORA))
    batch = default_collate_fn([rows()[1]])["data"]
    ours(batch)["loss"].backward()
    for name, weight in ours.named_parameters():
        if weight.requires_grad:
            assert weight.grad is not None, name


def test_images_and_places_must_agree():
    ours = make()
    batch = default_collate_fn(rows())["data"]
    batch["pixel_values"] = batch["pixel_values"][:2]
    with pytest.raises(ValueError, match="3 image tokens in the text, but 2 images"):
        ours(batch)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (dict(freeze_llm=True, freeze_visual_encoder=True), {"projector"}),
        (dict(freeze_visual_encoder=True), {"projector", "llm"}),
        (
            dict(
                freeze_llm=True,
                freeze_visual_encoder=True,
                llm_lora=LoraConfig(task_type="CAUSAL_LM", **LORA),
                visual_encoder_lora=LoraConfig(**LORA),
            ),
            {"projector", "llm", "visual_encoder"},
        ),
    ],
)
def test_what_is_trained_is_what_is_saved(settings, parts, tmp_path):
    ours = make(**settings)
    state = ours.state_dict()
    assert {name.partition(".")[0] for name in state} == parts
    again = make(**copy.deepcopy(settings))
    for weight in again.parameters():
        weight.data += 1
    loaded = again.load_state_dict(state, strict=False)
    assert not loaded.unexpected_keys
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, state[name])


def test_pretraining_goes_on_in_fine_tuning(tmp_path):
    first = make(freeze_llm=True, freeze_visual_encoder=True)
    torch.save({"state_dict": first.state_dict(), "meta": {}}, tmp_path / "iter_1.pth")
    torch.manual_seed(7)
    second = LLaVAModel(
        llm=make_model("llama"),
        visual_encoder=make_clip(),
        pretrained_pth=str(tmp_path / "iter_1.pth"),
    )
    torch.testing.assert_close(second.projector.state_dict(), first.projector.state_dict())
    with pytest.raises(UserError, match="no such checkpoint"):
        make(pretrained_pth=str(tmp_path / "none.pth"))
    torch.save({"state_dict": {"other.weight": torch.ones(1)}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="of another model"):
        make(pretrained_pth=str(tmp_path / "other.pth"))


def test_checkpoints_of_v0_1_and_of_deepspeed_are_begun_with(tmp_path):
    first = make(freeze_llm=True, freeze_visual_encoder=True)
    weights = first.state_dict()
    history = HistoryBuffer()
    history.update(1.0)
    old = {"state_dict": weights, "message_hub": {"log_scalars": {"loss": history}}}
    torch.save(old, tmp_path / "iter_1.pth")
    folder = tmp_path / "iter_2.pth"
    folder.mkdir()
    model = {
        "module": weights,
        "param_shapes": [{name: value.shape for name, value in weights.items()}],
        "mp_world_size": 1,
    }
    torch.save(model, folder / "mp_rank_00_model_states.pt")
    flat = torch.cat([value.flatten() for value in weights.values()])
    part = {"single_partition_of_fp32_groups": [flat], "partition_count": [1]}
    name = "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": part}, folder / name)
    for place in ("iter_1.pth", "iter_2.pth"):
        torch.manual_seed(7)
        second = LLaVAModel(
            llm=make_model("llama"),
            visual_encoder=make_clip(),
            pretrained_pth=str(tmp_path / place),
        )
        torch.testing.assert_close(second.projector.state_dict(), first.projector.state_dict())


def test_a_frozen_language_model_keeps_its_number_format(tmp_path):
    make_model("llama").bfloat16().save_pretrained(tmp_path)
    llm = dict(
        type=AutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path=str(tmp_path)
    )
    for frozen, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        ours = LLaVAModel(llm=llm, visual_encoder=make_clip(), freeze_llm=frozen)
        assert ours.llm.dtype == dtype


@pytest.mark.parametrize("encoder_lora", [None, LoraConfig(**LORA)])
def test_an_encoder_that_is_trained_computes_its_activations_twice(encoder_lora):
    ours = make(freeze_visual_encoder=True, visual_encoder_lora=encoder_lora)
    assert ours.visual_encoder.is_activation_checkpointing == (encoder_lora is not None)


def test_hugging_faces_form_has_equal_logits(tmp_path):
    tokenizer = make_tokenizer()
    ours = make(
        freeze_llm=True,
        llm_lora=LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **LORA),
        visual_encoder_lora=LoraConfig(init_lora_weights=False, **LORA),
        tokenizer=tokenizer,
    ).eval()
    ours.to_hf(tmp_path / "hf", save_format="huggingface")
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    row = rows()[2]
    ids = [
        token
        for each in row["input_ids"]
        for token in ([theirs.config.image_token_index] * PATCHES if each == IMAGE else [each])
    ]
    with torch.no_grad():
        expected = ours(default_collate_fn([row])["data"], mode="tensor").logits
        found = theirs(input_ids=torch.tensor([ids]), pixel_values=row["pixel_values"]).logits
    size = min(expected.shape[-1], found.shape[-1])
    torch.testing.assert_close(found[..., :size], expected[..., :size], rtol=1e-4, atol=1e-4)


def test_our_own_form_has_a_folder_for_each_part(tmp_path):
    ours = make(
        freeze_llm=True,
        freeze_visual_encoder=True,
        llm_lora=LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **LORA),
        visual_encoder_lora=LoraConfig(init_lora_weights=False, **LORA),
    )
    ours.to_hf(tmp_path / "out")
    projector = AutoModel.from_pretrained(tmp_path / "out" / "projector")
    torch.testing.assert_close(projector.state_dict(), ours.projector.state_dict())
    torch.manual_seed(0)
    llm = PeftModel.from_pretrained(make_model("llama"), tmp_path / "out" / "llm_adapter")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(
            llm.eval()(input_ids=ids).logits, ours.eval().llm(input_ids=ids).logits
        )
    assert (tmp_path / "out" / "visual_encoder_adapter" / "adapter_config.json").is_file()


def test_the_official_form_is_a_llama_with_a_projector(tmp_path):
    from safetensors.torch import load_file

    ours = make(freeze_visual_encoder=True)
    ours.to_hf(tmp_path / "out", save_format="official")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(
        weights["model.mm_projector.2.weight"], ours.projector.model[2].weight.data
    )
    assert "model.layers.1.mlp.up_proj.weight" in weights


def test_siglip_has_a_feature_for_every_patch():
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    encoder = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=SIZE,
            patch_size=8,
        )
    )
    ours = LLaVAModel(llm=make_model("llama"), visual_encoder=encoder)
    batch = default_collate_fn(rows())["data"]
    merged = ours.with_images(batch)
    assert merged["inputs_embeds"].shape[1] == 7 - 2 + 2 * PATCHES
    ours(batch)["loss"].backward()
    for name, weight in ours.named_parameters():
        assert weight.grad is not None or not weight.requires_grad, name
