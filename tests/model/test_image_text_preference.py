"""DPO, ORPO and rewards of vision-language models equal the plain class, answer by answer."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForSequenceClassification

from tests.helpers.image_text import (
    collated,
    image_text_folder,
    make_image,
    plain_image_text,
    processed,
    samples_of,
)
from tests.helpers.tiers import slow
from xtuner.dataset import VisionLanguagePreferenceDataset
from xtuner.dataset.collate_fns import vision_language_collate_fn
from xtuner.model import VisionLanguageDPO, VisionLanguageORPO, VisionLanguageRewardModel
from xtuner.proving.training import move_adapter, train_on
from xtuner.tokenization.processor import load_processor
from xtuner.utils.errors import UserError

BETA = 0.1
KINDS = ("qwen2_5_vl", "qwen3_vl", "gemma3", "internvl")
LORA = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}


def pairs_of(processor):
    """Two pairs: about an image, and about two; the rejected answer has other words."""
    with_image, _, with_two = samples_of(processor)
    return [
        side
        for text, images in (with_image, with_two)
        for side in ((text, images), (text.replace("square", "dog").replace("two", "one"), images))
    ]


def own_log_probs(processor, model, samples):
    """(2 P,) of answers by a class of transformers, each alone; image tokens are not counted."""
    found = []
    for sample in samples:
        batch = processed(processor, [sample])
        types = torch.tensor(processor.create_mm_token_type_ids(batch["input_ids"].tolist()))[0]
        logits = model(**batch, use_cache=False).logits[0, :-1].float()
        targets = batch["input_ids"][0, 1:]
        log_probs = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        found.append(log_probs[types[1:] == 0].sum())
    return torch.stack(found)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_the_plain_class(kind, packed):
    processor = load_processor(str(image_text_folder(kind)))
    samples = pairs_of(processor)
    reference, plain = plain_image_text(kind), plain_image_text(kind)
    with torch.no_grad():  # or the loss is ln 2 whatever is computed
        for weight in plain.get_decoder().parameters():
            weight.mul_(1.05)
    llm, ref_llm = (plain_image_text(kind, attn_implementation="sdpa") for _ in range(2))
    llm.load_state_dict(plain.state_dict())
    for name, weight in plain.named_parameters():
        weight.requires_grad_(".layers." in name and "vision" not in name and "visual" not in name)
    model = VisionLanguageDPO(
        llm, ref_llm=ref_llm, processor=processor, use_varlen_attn=packed, beta=BETA
    ).eval()
    found = train_on(model, [collated(processor, samples, packed=packed)])
    ratios = (
        own_log_probs(processor, plain, samples)
        - own_log_probs(processor, reference, samples).detach()
    )
    loss = -nn.functional.logsigmoid(BETA * (ratios[::2] - ratios[1::2])).mean()
    loss.backward()
    assert found.loss == pytest.approx(loss.item(), abs=1e-5)
    compared = 0
    for name, weight in plain.named_parameters():
        if weight.grad is not None:
            compared += 1
            scale = weight.grad.abs().max() + 1e-8
            assert (found.gradients[name] - weight.grad).abs().max() < 1e-3 * scale, name
    assert compared > 4


@pytest.mark.parametrize("lora", [None, LORA])
def test_the_loss_begins_at_ln_2(lora):
    processor = load_processor(str(image_text_folder("qwen3_vl")))
    samples = pairs_of(processor)
    adapter = None if lora is None else LoraConfig(**lora)
    model = VisionLanguageDPO(plain_image_text("qwen3_vl"), lora=adapter, processor=processor)
    model.eval()
    batch = collated(processor, samples, packed=False)
    assert train_on(model, [batch]).loss == pytest.approx(0.693147, abs=1e-5)
    if lora is not None:
        move_adapter(model)
        assert abs(train_on(model, [batch]).loss - 0.693147) > 1e-5


def test_no_values_in_advance():
    with pytest.raises(UserError, match="not computed in advance"):
        VisionLanguageDPO(
            plain_image_text("gemma3"),
            processor=load_processor(str(image_text_folder("gemma3"))),
            precompute_reference=True,
        )


@pytest.mark.parametrize("kind, packed", [("qwen2_5_vl", True), slow("gemma3", False)])
def test_orpo_equals_the_plain_class(kind, packed):
    processor = load_processor(str(image_text_folder(kind)))
    samples, plain = pairs_of(processor), plain_image_text(kind)
    for name, weight in plain.named_parameters():
        weight.requires_grad_(".layers." in name and "vision" not in name and "visual" not in name)
    llm = plain_image_text(kind, attn_implementation="sdpa")
    model = VisionLanguageORPO(llm, processor=processor, use_varlen_attn=packed, beta=BETA).eval()
    found = train_on(model, [collated(processor, samples, packed=packed)])
    sums = own_log_probs(processor, plain, samples)
    tokens = torch.tensor([count_of(processor, sample) for sample in samples])
    chosen, rejected = (sums / tokens)[::2], (sums / tokens)[1::2]
    odds = chosen - rejected - torch.log1p(-chosen.exp()) + torch.log1p(-rejected.exp())
    loss = -sums[::2].sum() / tokens[::2].sum() - BETA * nn.functional.logsigmoid(odds).mean()
    loss.backward()
    assert found.loss == pytest.approx(loss.item(), rel=1e-5)
    for name, weight in plain.named_parameters():
        if weight.grad is not None:
            scale = weight.grad.abs().max() + 1e-8
            assert (found.gradients[name] - weight.grad).abs().max() < 1e-3 * scale, name


def count_of(processor, sample):
    """Tokens of a sample that are trained: all but the first and those of images."""
    ids = processed(processor, [sample])["input_ids"]
    types = torch.tensor(processor.create_mm_token_type_ids(ids.tolist()))[0]
    return int((types[1:] == 0).sum())


QUESTIONS = (("What is it?", "a square", "a dog", 1), ("Which one?", "the first", "none", 2))


def own_reward(processor, model, question, answer, images, token):
    """The logit of a class of transformers for one conversation that ends in the token."""
    seen = [{"type": "image", "image": image} for image in images]
    messages = [
        {"role": "user", "content": [*seen, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    batch = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt"
    )
    more = {"input_ids": token, "attention_mask": 1}
    shape = batch["input_ids"].shape
    for name, value in batch.items():
        if value.shape == shape:
            batch[name] = torch.cat([value, value.new_full((1, 1), more.get(name, 0))], 1)
    return model(**batch).logits[0, 0]


@pytest.mark.parametrize("packed", [True, slow(False)])
@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5"])
def test_rewards_are_those_of_transformers_class(kind, packed, tmp_path):
    processor = load_processor(str(image_text_folder(kind)))
    token = processor.tokenizer.eos_token_id
    images = [make_image(56, 28, 1), make_image(28, 28, 2)]
    rows = [
        {"question": q, "chosen": good, "rejected": bad, "images": images[:count]}
        for q, good, bad, count in QUESTIONS
    ]
    data = VisionLanguagePreferenceDataset(
        Dataset.from_list(rows), processor, 128, is_reward=True, reward_token_id=token
    )
    batch = vision_language_collate_fn(list(data), processor, use_varlen_attn=packed)["data"]
    model = VisionLanguageRewardModel(
        plain_image_text(kind, attn_implementation="sdpa"),
        processor=processor,
        use_varlen_attn=packed,
        loss_type="ranking",
        penalty_type="none",
    ).eval()
    model.to_hf(tmp_path / "hf")
    found = train_on(model, [batch])
    plain = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "hf", attn_implementation="eager", dtype=torch.float32
    ).eval()
    plain.config.get_text_config().pad_token_id = None
    rewards = [
        own_reward(processor, plain, question, answer, images[:count], token)
        for question, good, bad, count in QUESTIONS
        for answer in (good, bad)
    ]
    chosen, rejected = torch.stack(rewards[::2]), torch.stack(rewards[1::2])
    loss = -nn.functional.logsigmoid(chosen - rejected).mean()
    loss.backward()
    assert abs((chosen - rejected).mean()) > 1e-4
    assert found.loss == pytest.approx(loss.item(), rel=1e-5)
    gradients = {name: weight.grad for name, weight in plain.named_parameters()}
    ours = {**found.gradients, "score.weight": model.v_head.weight.grad}
    assert len(ours) > 10
    for name, gradient in ours.items():
        scale = gradients[name].abs().max() + 1e-8
        assert (gradient - gradients[name]).abs().max() < 1e-3 * scale, name


def test_reward_models_that_nothing_could_load_are_refused():
    with pytest.raises(UserError, match="no class for a reward model of qwen2_5_vl") as error:
        VisionLanguageRewardModel(
            plain_image_text("qwen2_5_vl"),
            processor=load_processor(str(image_text_folder("qwen2_5_vl"))),
        )
    assert "it has one for: gemma3, qwen3_5." in error.value.hint
