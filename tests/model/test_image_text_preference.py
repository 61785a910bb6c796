"""DPO and ORPO of vision-language models equal the plain class, answer by answer."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig
from torch import nn

from tests.helpers.image_text import (
    collated,
    image_text_folder,
    plain_image_text,
    processed,
    samples_of,
)
from tests.helpers.tiers import slow
from xtuner.model import VisionLanguageDPO, VisionLanguageORPO
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
