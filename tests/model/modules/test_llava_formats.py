"""``convert llava`` and ``convert phi_to_llama``: other forms of a model, the same logits."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    CLIPVisionModel,
    LlavaForConditionalGeneration,
    Phi3Config,
    Phi3ForCausalLM,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests.helpers.tiny import make_tokenizer, save_tiny
from tests.helpers.vision_language import PATCH, SIZE, WIDTH, save_clip, save_square
from xtuner.chat.vision_language import build_vision_language_model
from xtuner.dataset.images import load_image, pixel_values
from xtuner.entry_point import main
from xtuner.export.llava import require_llava
from xtuner.model import LLaVAModel, SupervisedFinetune
from xtuner.utils.errors import UserError

IMAGE = -200
TEXT = [1, IMAGE, 40, 41, 42, 43]
LORA = dict(r=4, lora_alpha=8, init_lora_weights=False)


def save_siglip(folder: Path) -> Path:
    config = SiglipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
    )
    torch.manual_seed(1)
    SiglipVisionModel(config).save_pretrained(folder)
    SiglipImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder


ENCODERS = {"clip": (CLIPVisionModel, save_clip), "siglip": (SiglipVisionModel, save_siglip)}


def compute_logits(llava, pixels):
    batch = {"input_ids": torch.tensor([TEXT]), "pixel_values": pixels}
    with torch.no_grad():
        return llava.eval()(batch, mode="tensor").logits


def theirs(folder, pixels):
    """The logits of stock transformers."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    token = model.config.image_token_index
    assert processor.tokenizer.get_vocab()["<image>"] == token
    ids = [
        i
        for each in TEXT
        for i in ([token] * model.config.image_seq_length if each < 0 else [each])
    ]
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits


@pytest.mark.parametrize("kind", ENCODERS)
def test_there_and_back_the_logits_are_equal(kind, tmp_path):
    kind_of_encoder, save = ENCODERS[kind]
    llm, eye = save_tiny(tmp_path / "llm"), save(tmp_path / "eye")
    torch.manual_seed(0)
    ours = LLaVAModel(
        llm=AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32),
        visual_encoder=kind_of_encoder.from_pretrained(eye),
        freeze_llm=True,
        freeze_visual_encoder=True,
        llm_lora=LoraConfig(task_type="CAUSAL_LM", **LORA),
        visual_encoder_lora=LoraConfig(**LORA),
    )
    ours.to_hf(tmp_path / "parts")
    words = [str(tmp_path / "parts"), str(tmp_path / "hf"), "--llm", str(llm)]
    words += ["--visual-encoder", str(eye), "--torch-dtype", "fp32"]
    assert main(["convert", "llava", *words]) == 0

    picture = load_image(save_square(tmp_path / "red.png", "red"))
    seeing = build_vision_language_model(ours.llm, tmp_path / "parts", str(eye), -2)
    pixels = pixel_values(picture, seeing.image_processor, square=True)[None]
    expected = compute_logits(ours, pixels)
    found = theirs(tmp_path / "hf", pixels)
    words = expected.shape[-1]
    torch.testing.assert_close(found[..., :words], expected, rtol=1e-4, atol=1e-4)
    # What their processor makes of the picture is what training saw.
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    made = processor(text="<image>", images=picture, return_tensors="pt")
    torch.testing.assert_close(made["pixel_values"], pixels)
    assert made["input_ids"].shape[1] >= 16

    back = [str(tmp_path / "hf"), str(tmp_path / "back"), "--save-format", "xtuner"]
    assert main(["convert", "llava", *back]) == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    seeing = build_vision_language_model(again, tmp_path / "back", None, -2)
    assert torch.equal(pixel_values(picture, seeing.image_processor, square=True)[None], pixels)
    found = compute_logits(seeing.llava, pixels)
    torch.testing.assert_close(found[..., :words], expected, rtol=1e-4, atol=1e-4)


def test_what_is_missing_is_said(tmp_path, capsys):
    (tmp_path / "parts" / "projector").mkdir(parents=True)
    assert main(["convert", "llava", str(tmp_path / "parts"), str(tmp_path / "out")]) == 1
    assert "--llm" in capsys.readouterr().err
    assert main(["convert", "llava", str(tmp_path), str(tmp_path / "out")]) == 1
    assert "there is no projector/" in capsys.readouterr().err


def test_other_models_have_no_other_form():
    with pytest.raises(UserError, match="is for LLaVA models; this is SupervisedFinetune"):
        require_llava({"type": SupervisedFinetune}, "huggingface")
    require_llava({"type": LLaVAModel}, "huggingface")


def save_phi(folder, **settings):
    config = Phi3Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **settings,
    )
    torch.manual_seed(0)
    Phi3ForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_a_phi_becomes_a_llama_of_equal_logits(tmp_path, capsys):
    phi = save_phi(tmp_path / "phi", sliding_window=16)
    assert main(["convert", "phi_to_llama", str(phi), str(tmp_path / "llama")]) == 0
    assert "attends to the last 16 tokens" in capsys.readouterr().out
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        first, second = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)(ids).logits
            for name in ("phi", "llama")
        )
    torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "llama" / "tokenizer.json").is_file()


def test_what_is_no_plain_phi_is_refused(tmp_path, capsys):
    llama = save_tiny(tmp_path / "llm")
    assert main(["convert", "phi_to_llama", str(llama), str(tmp_path / "out")]) == 1
    assert "this is a llama model, not phi3" in capsys.readouterr().err
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    long = save_phi(tmp_path / "long", rope_parameters=rope)
    assert main(["convert", "phi_to_llama", str(long), str(tmp_path / "out")]) == 1
    assert "LongRoPE scaling of long-context" in capsys.readouterr().err
