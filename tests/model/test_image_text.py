"""VisionLanguageFinetune against the plain classes: loss and gradients, packed, padded, frozen."""

import functools

import pytest
import torch
from transformers import AutoModelForImageTextToText
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.helpers.image_text import (
    FAMILIES,
    OF_TEXT,
    collated,
    image_text_folder,
    own_loss,
    plain_image_text,
    processed,
    samples_of,
)
from tests.helpers.support import Wrong, require_same
from tests.helpers.tiny import make_model
from xtuner.model import SupervisedFinetune, VisionLanguageFinetune
from xtuner.model.modules import attention, image_rows
from xtuner.proving.training import Trained, gradients_of
from xtuner.tokenization.processor import load_processor
from xtuner.utils.errors import UserError

WHOLE = {"freeze_visual_encoder": False, "freeze_projector": False}
CPU = torch.device("cpu")
POSITIONS = ("qwen2_5_vl", "qwen3_5")
BLOCKS = ("gemma3", "gemma4")
PACKED_ENCODERS = ("qwen2_5_vl", "qwen3_vl", "glm4v")


@functools.cache
def processor_of(kind):
    return load_processor(image_text_folder(kind))


@functools.cache
def wanted(kind):
    """Each sample alone, by the plain class."""
    processor = processor_of(kind)
    return own_loss(processor, plain_image_text(kind), samples_of(processor))


def make(kind, packed=False, **settings):
    llm = {
        "type": AutoModelForImageTextToText.from_pretrained,
        "pretrained_model_name_or_path": str(image_text_folder(kind)),
        "dtype": torch.float32,
    }
    settings = {"use_activation_checkpointing": False, **settings}
    return VisionLanguageFinetune(
        llm, processor=processor_of(kind), use_varlen_attn=packed, **settings
    ).eval()


def batch(kind, packed=False, which=slice(None)):
    processor = processor_of(kind)
    return collated(processor, samples_of(processor)[which], packed=packed)


def train(model, data):
    loss = model(model.prepare_batch(data, CPU))["loss"]
    loss.backward()
    return Trained(loss.item(), gradients_of(model.llm))


@pytest.mark.parametrize("kind", FAMILIES)
def test_padded_rows_are_the_plain_class_on_the_processors_batch(kind):
    processor, data = processor_of(kind), batch(kind, which=slice(0, None, 2))
    own = processed(processor, samples_of(processor)[::2])
    assert torch.equal(
        own["input_ids"] * own["attention_mask"], data["input_ids"] * data["attention_mask"]
    )
    assert all(torch.equal(own[name], data["images"][name]) for name in own.keys() - OF_TEXT)
    model = make(kind)  # the language model alone is trained by default
    theirs = {
        name: value
        for name, value in wanted(kind).gradients.items()
        if model.parts.part_of(name) == "language_model"
    }
    found = train(model, batch(kind))
    require_same(found, Trained(wanted(kind).loss, theirs))
    assert {model.parts.part_of(name) for name in found.gradients} == {"language_model"}
    parts = {model.parts.part_of(name) for name in wanted(kind).gradients}
    assert parts == {"language_model", "projector", "visual_encoder"}


@pytest.mark.parametrize("kind", FAMILIES)
def test_packed_rows_are_samples_alone(kind):
    model = make(kind, packed=True, use_activation_checkpointing=True, **WHOLE).train()
    require_same(train(model, batch(kind, packed=True)), wanted(kind))


@pytest.mark.parametrize("kind", PACKED_ENCODERS)
def test_an_encoder_computes_the_images_of_a_batch_by_one_call_of_a_layer(kind, monkeypatch):
    """Without a look at the lengths of images, for which the CPU would wait for a GPU."""
    calls = []

    def count(*args, **kwargs):
        calls.append(kwargs)
        return attention.attention(*args, **kwargs)

    model = make(kind, packed=True)
    model.probed_rows = frozenset({"packed", "images"})
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, attention.PACKED_ENCODER, count)
    train(model, batch(kind, packed=True))
    layers = [m for m in model.llm.modules() if type(m).__name__.endswith("VisionAttention")]
    assert len(calls) == len(layers) > 0
    assert all(len(call["cu_seq_lens_q"]) > 2 and not call["is_causal"] for call in calls)


@pytest.mark.parametrize("kind", POSITIONS)
def test_wrong_positions_are_found(kind, monkeypatch):
    monkeypatch.setattr(VisionLanguageFinetune, "_with_positions", lambda self, data: data)
    with pytest.raises(Wrong):
        require_same(train(make(kind, packed=True), batch(kind, packed=True)), wanted(kind))


@pytest.mark.parametrize("kind", BLOCKS)
def test_causal_image_tokens_are_found(kind, monkeypatch):
    monkeypatch.setattr(attention, "lets_see_later_tokens", lambda function: False)
    for packed in (False, True):
        with pytest.raises(Wrong):
            require_same(train(make(kind, packed), batch(kind, packed)), wanted(kind))


@pytest.mark.parametrize("kind", BLOCKS)
def test_missing_token_types_are_found(kind, monkeypatch):
    model = make(kind, packed=True)
    monkeypatch.setattr(image_rows, "TOKEN_TYPES", ())
    with pytest.raises(Wrong):
        require_same(train(model, batch(kind, packed=True)), wanted(kind))


def test_samples_that_see_each_other_are_refused():
    data = batch("qwen2_5_vl", packed=True)
    table = torch.randn(576, 8, generator=torch.Generator().manual_seed(0))
    types = data["mm_token_type_ids"]
    image_rows.require_separate_samples(lambda row: table[row["input_ids"]], data, types, "Model")
    # the product of earlier tokens: the same words in another order change it
    with pytest.raises(UserError, match="not computed separately by Model"):
        image_rows.require_separate_samples(
            lambda row: (table[row["input_ids"]].cumsum(1) ** 2).cumsum(1), data, types, "Model"
        )


@pytest.mark.parametrize("kind", ["qwen3_vl", "gemma3", "llava_onevision", "smolvlm"])
def test_rows_of_text_give_gradients_of_0_to_what_is_trained_for_images(kind):
    model = make(kind, freeze_llm=True, **WHOLE)
    found = train(model, batch(kind, which=slice(1, 2)))
    processor = processor_of(kind)
    plain = own_loss(processor, plain_image_text(kind), samples_of(processor)[1:2])
    assert found.loss == pytest.approx(plain.loss, rel=1e-5)
    trained = {name for name, weight in model.llm.named_parameters() if weight.requires_grad}
    assert found.gradients.keys() == trained
    assert not any(value.any() for value in found.gradients.values())
    reached = {name for name, value in wanted(kind).gradients.items() if value.any()}
    assert trained == {n for n in reached if model.parts.part_of(n) != "language_model"}


def test_a_step_is_the_same_without_prepare_batch():
    model, data = make("qwen2_5_vl", packed=True), batch("qwen2_5_vl", packed=True)
    del data["mm_token_type_ids"]
    loss = model(data)["loss"]
    assert loss.item() == pytest.approx(wanted("qwen2_5_vl").loss, rel=1e-5)
    (predicted,) = model(data, mode="predict")
    assert predicted["logits"].shape[:2] == data["input_ids"].shape


def test_images_and_their_tokens_come_together():
    model, data = make("qwen2_5_vl"), batch("qwen2_5_vl")
    images = data.pop("images")
    with pytest.raises(UserError, match="no images came"):
        model.prepare_batch(data, CPU)
    text = batch("qwen2_5_vl", which=slice(1, 2))
    with pytest.raises(UserError, match="no image tokens"):
        model.prepare_batch({**text, "images": images}, CPU)
    with pytest.raises(UserError, match="text alone"):
        SupervisedFinetune(make_model())({**text, "images": images})


@pytest.mark.parametrize("kind", ["gemma3", "internvl"])
def test_images_of_another_size_are_refused(kind):
    model, data = make(kind), batch(kind)
    ids = data["input_ids"]
    image = model.causal_lm.config.image_token_id
    ids[(ids == image).nonzero()[0].unbind()] = 5  # one token less than the images have features
    with pytest.raises(UserError, match="do not fit the rows"):
        model(data)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="needs its processor"):
        VisionLanguageFinetune(make_model())
    with pytest.raises(UserError, match="no visual encoder"):
        VisionLanguageFinetune(make_model(), processor=processor_of("gemma3"))
    with pytest.raises(UserError, match="nothing is trained"):
        make("gemma3", freeze_llm=True)


@pytest.mark.parametrize("kind", BLOCKS)
def test_packed_rows_with_images_are_computed_by_our_attention_or_refused(kind):
    llm = plain_image_text(kind, attn_implementation="sdpa")
    settings = dict(processor=processor_of(kind), use_activation_checkpointing=False)
    model = VisionLanguageFinetune(llm, use_varlen_attn=True, **settings).eval()
    loss = train(model, batch(kind, packed=True)).loss
    assert loss == pytest.approx(wanted(kind).loss, rel=1e-5)
    eager = VisionLanguageFinetune(plain_image_text(kind), use_varlen_attn=True, **settings)
    with pytest.raises(UserError, match="not computed separately by 'eager'"):
        train(eager.eval(), batch(kind, packed=True))


def test_inputs_that_a_class_takes_and_no_batch_has_are_refused(monkeypatch):
    """PaliGemma's token types mark the prompt, not images; Mllama takes a cross_attention_mask."""
    prefix = load_processor(image_text_folder("gemma3"))
    prefix.return_mm_token_type_ids = False
    with pytest.raises(UserError, match="takes token_type_ids from its processor"):
        VisionLanguageFinetune(plain_image_text("gemma3"), processor=prefix)
    known = load_processor(image_text_folder("qwen2_5_vl"))
    names = [*known.model_input_names, "past_key_values"]
    monkeypatch.setattr(type(known), "model_input_names", names)
    with pytest.raises(UserError, match="takes past_key_values from its processor"):
        VisionLanguageFinetune(plain_image_text("qwen2_5_vl"), processor=known)
