"""Visual encoder, projector and language model: found, adapted and trained apart."""

import functools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from tests.helpers.image_text import (
    FAMILIES,
    collated,
    image_text_folder,
    own_loss,
    plain_image_text,
    samples_of,
)
from tests.helpers.support import require_same
from tests.helpers.tiers import few_fast, slow
from tests.helpers.tiny import make_model
from xtuner.model import VisionLanguageFinetune
from xtuner.model.modules.vision_parts import VisionParts
from xtuner.proving.training import Trained, copy_trained, gradients_of, move_adapter
from xtuner.tokenization.processor import load_processor
from xtuner.utils.errors import UserError

PROJECTORS = {
    "qwen2_5_vl": ("model.visual.merger",),
    "qwen3_vl": ("model.visual.merger", "model.visual.deepstack_merger_list"),
    "qwen3_5": ("model.visual.merger",),
    "gemma3": ("model.multi_modal_projector",),
    "gemma4": ("model.embed_vision",),
    "internvl": ("model.multi_modal_projector",),
    "llava_onevision": ("model.multi_modal_projector", "model.image_newline"),
    "smolvlm": ("model.connector",),
    "mistral3": ("model.multi_modal_projector",),
    "glm4v": ("model.visual.merger",),
}
LORA = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
OF_ENCODER = {"r": 2, "lora_alpha": 8}


@functools.cache
def processor_of(kind):
    return load_processor(image_text_folder(kind))


def make(kind, quantization=None, **settings):
    llm = {
        "type": AutoModelForImageTextToText.from_pretrained,
        "pretrained_model_name_or_path": str(image_text_folder(kind)),
        "dtype": torch.float32,
        **({"quantization_config": quantization} if quantization else {}),
    }
    return VisionLanguageFinetune(llm, processor=processor_of(kind), **settings).eval()


def trained(model):
    return {name for name, weight in model.llm.named_parameters() if weight.requires_grad}


def parts_of(model):
    """The parts with trained weights."""
    return {model.parts.part_of(name) for name in trained(model)}


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_parts_of_a_family(kind):
    model = plain_image_text(kind)
    parts = VisionParts.of(model)
    assert parts.projector == PROJECTORS[kind]
    (encoder,) = parts.visual_encoder
    assert encoder in ("model.visual", "model.vision_tower", "model.vision_model")
    assert parts.part_of("lm_head.weight") == "language_model"
    assert parts.part_of(f"{encoder}.x") == "visual_encoder"
    with pytest.raises(UserError, match="no visual encoder"):
        VisionParts.of(make_model())


def require_same_as_peft(model, kind, packed):
    """Its loss and gradients, and peft's of each sample by the plain class."""
    move_adapter(model)
    processor = processor_of(kind)
    loss = model.train()(collated(processor, samples_of(processor), packed=packed))["loss"]
    loss.backward()
    config = model.llm.peft_config["default"]
    plain = get_peft_model(plain_image_text(kind), config).eval()
    copy_trained(model.llm, plain)
    found = Trained(loss.item(), gradients_of(model.llm))
    wanted = own_loss(processor, plain, samples_of(processor))
    wanted.gradients = {k: v for k, v in wanted.gradients.items() if k in found.gradients}
    require_same(found, wanted)
    assert found.gradients.keys() == trained(model)


@pytest.mark.parametrize("kind", few_fast(FAMILIES, ("qwen2_5_vl", "gemma3", "smolvlm")))
def test_an_adapter_on_both_is_pefts_on_the_plain_class(kind):
    """Packed rows, activations recomputed, the projector trained as a whole."""
    model = make(
        kind,
        use_varlen_attn=True,
        lora={"type": LoraConfig, **LORA},
        visual_encoder_lora={"type": LoraConfig, **OF_ENCODER},
        freeze_projector=False,
    )
    require_same_as_peft(model, kind, packed=True)
    assert parts_of(model) == {"language_model", "visual_encoder", "projector"}


@pytest.mark.parametrize("recomputed", [True, slow(False)])
@pytest.mark.parametrize("packed", [True, slow(False)])
@pytest.mark.parametrize("kind", few_fast(FAMILIES, ("qwen3_vl", "mistral3")))
def test_an_adapter_is_pefts_on_the_plain_class(kind, packed, recomputed):
    model = make(
        kind,
        use_varlen_attn=packed,
        use_activation_checkpointing=recomputed,
        lora={"type": LoraConfig, **LORA},
    )
    require_same_as_peft(model, kind, packed)
    assert parts_of(model) == {"language_model"}


def test_an_adapter_is_on_the_language_model_alone_by_default():
    model = make("qwen2_5_vl", lora={"type": LoraConfig, **LORA})
    assert parts_of(model) == {"language_model"}
    assert all("lora_" in name for name in trained(model))


def test_the_encoder_has_a_rank_of_its_own():
    model = make(
        "smolvlm",
        freeze_llm=True,
        visual_encoder_lora={"type": LoraConfig, **OF_ENCODER, "target_modules": ["q_proj"]},
    )
    assert parts_of(model) == {"visual_encoder"}
    assert all("q_proj" in name for name in trained(model))
    both = make(
        "qwen3_vl",
        lora={"type": LoraConfig, **LORA},
        visual_encoder_lora={"type": LoraConfig, **OF_ENCODER},
    )
    ranks = {
        (both.parts.part_of(name), weight.shape[0])
        for name, weight in both.llm.named_parameters()
        if "lora_A" in name
    }
    assert ranks == {("language_model", 4), ("visual_encoder", 2)}


@pytest.mark.parametrize("kind", ["qwen3_vl", "gemma3"])
def test_the_encoder_is_trained_whole_beside_an_adapter(kind):
    settings = {"lora": {"type": LoraConfig, **LORA}, "freeze_visual_encoder": False}
    model = make(kind, **settings)
    assert parts_of(model) == {"language_model", "visual_encoder"}
    assert parts_of(make(kind, freeze_projector=False, **settings)) == {
        *("language_model", "visual_encoder", "projector")
    }


def test_settings_that_contradict_each_other_are_refused():
    lora, other = {"type": LoraConfig, **LORA}, {"type": LoraConfig, **OF_ENCODER}
    for message, settings in (
        ("as a whole and adapted", {"visual_encoder_lora": other, "freeze_visual_encoder": False}),
        ("freezes it", {"lora": lora, "freeze_llm": True}),
        ("trained as a whole", {"visual_encoder_lora": other}),
        ("lora_dropout", {"lora": lora, "visual_encoder_lora": {**other, "lora_dropout": 0.1}}),
        ("no layer", {"lora": lora, "visual_encoder_lora": {**other, "target_modules": ["x"]}}),
    ):
        with pytest.raises(UserError, match=message):
            make("smolvlm", **settings)


@pytest.mark.parametrize("kind", ["qwen3_vl", "gemma3"])
def test_4_bits_are_for_the_language_model(kind):
    """Packed rows are the samples alone there, too; the projector is trained as a whole."""
    pytest.importorskip("bitsandbytes")
    bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = make(
        kind,
        quantization=bits,
        lora={"type": LoraConfig, **LORA},
        freeze_projector=False,
        use_varlen_attn=True,
    )
    move_adapter(model)
    quantized = {
        model.parts.part_of(name)
        for name, layer in model.llm.named_modules()
        if type(layer).__name__ == "Linear4bit"
    }
    assert quantized == {"language_model"}
    processor, samples = processor_of(kind), samples_of(processor_of(kind))
    packed = model(collated(processor, samples, packed=True))["loss"]
    packed.backward()
    assert parts_of(model) == {"language_model", "projector"}
    assert gradients_of(model.llm).keys() == trained(model)
    items = [collated(processor, [sample], packed=True) for sample in samples]
    total = {"tokens": sum(model.num_items(item)["tokens"] for item in items)}
    alone = sum(model(item, num_items_in_batch=total)["loss"].item() for item in items)
    assert alone == pytest.approx(packed.item(), rel=1e-5)
