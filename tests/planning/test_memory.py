"""Planned bytes are those of real instances, to the byte."""

import dataclasses

import pytest
import torch
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    CLIPVisionModel,
)

from tests.helpers.architectures import make_architecture
from tests.helpers.image_text import image_text_folder
from tests.helpers.tiers import slow
from tests.helpers.tiny_internvl import save_internvl
from tests.helpers.vision_language import save_clip
from xtuner.model import (
    DPO,
    InternVL_V1_5,
    LLaVAModel,
    SupervisedFinetune,
    VisionLanguageFinetune,
)
from xtuner.model.activation_checkpointing import Checkpointing
from xtuner.planning.activations import Activations
from xtuner.planning.memory import (
    Head,
    StateSizes,
    memory_of,
    optimizer_bytes,
    paged_bytes,
    state_sizes,
)
from xtuner.planning.planned_model import build_planned_model
from xtuner.planning.settings import RunSettings, Sharding
from xtuner.registry import BUILDER
from xtuner.tokenization.processor import load_processor

KINDS = (
    *("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "olmo2", "glm4"),
    *("granite", "qwen3_moe", "mixtral", "starcoder2"),
)
TIED = {"tie_word_embeddings": True}


def settings_of(folder, method):
    llm = dict(type=AutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path=str(folder))
    settings = dict(type=SupervisedFinetune, llm=llm)
    if method != "full":
        settings["lora"] = dict(type=LoraConfig, r=4, lora_alpha=8, task_type="CAUSAL_LM")
        llm["dtype"] = torch.bfloat16
    if method == "qlora":
        llm["quantization_config"] = dict(
            type=BitsAndBytesConfig, load_in_4bit=True, bnb_4bit_use_double_quant=True
        )
    return settings


def bytes_of_4bit(weight):
    """Of a weight of bitsandbytes with all that belongs to it."""
    state = weight.quant_state
    tensors = [weight, state.absmax, state.code]
    if state.nested:
        tensors += [state.state2.absmax, state.state2.code, state.offset]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def real_sizes(model):
    trained = frozen = 0
    for weight in model.parameters():
        size = weight.numel() * weight.element_size()
        if getattr(weight, "quant_state", None) is not None:
            size = bytes_of_4bit(weight)
        trained += size if weight.requires_grad else 0
        frozen += 0 if weight.requires_grad else size
    return trained, frozen


def real_optimizer_state(model):
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_state_equals_a_real_instance(kind, tmp_path):
    changes = TIED if kind in ("qwen2", "gemma2") else {}
    make_architecture(kind, attention="eager", **changes).save_pretrained(tmp_path)
    for method in ("full", "lora"):
        settings = settings_of(tmp_path, method)
        planned = state_sizes(build_planned_model(settings), "AdamW", 1.0)
        model = BUILDER.build(settings)
        assert (planned.trained, planned.frozen) == real_sizes(model), method
        assert planned.optimizer == real_optimizer_state(model), method
        assert planned.count == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2"])
def test_4_bits_equal_a_real_instance(kind, tmp_path):
    pytest.importorskip("bitsandbytes")
    make_architecture(kind, attention="eager").save_pretrained(tmp_path)
    settings = settings_of(tmp_path, "qlora")
    planned = state_sizes(build_planned_model(settings), "AdamW", 1.0)
    assert (planned.trained, planned.frozen) == real_sizes(BUILDER.build(settings))
    assert 0 < planned.quantized < planned.frozen


def vision_settings(kind, folder, method):
    """A model of images and text; all is trained, or an adapter and the projector."""
    lora = dict(type=LoraConfig, r=4, task_type="CAUSAL_LM") if method != "full" else None
    bits = dict(type=BitsAndBytesConfig, load_in_4bit=True, bnb_4bit_use_double_quant=True)
    quantized = {"quantization_config": bits} if method == "qlora" else {}
    if kind == "internvl_chat":
        path = save_internvl(folder / "model")
        return dict(
            type=InternVL_V1_5,
            model_path=str(path),
            llm_lora=lora,
            freeze_visual_encoder=bool(lora),
            quantization_llm=method == "qlora",
        )
    if kind == "llava":
        make_architecture("llama", attention="eager").save_pretrained(folder / "llm")
        llm = dict(
            type=AutoModelForCausalLM.from_pretrained,
            pretrained_model_name_or_path=str(folder / "llm"),
            **quantized,
        )
        encoder = dict(
            type=CLIPVisionModel.from_pretrained,
            pretrained_model_name_or_path=str(save_clip(folder / "clip")),
        )
        return dict(
            type=LLaVAModel, llm=llm, visual_encoder=encoder, llm_lora=lora,
            freeze_visual_encoder=bool(lora),
        )  # fmt: skip
    path = str(image_text_folder(kind))
    llm = dict(
        type=AutoModelForImageTextToText.from_pretrained,
        pretrained_model_name_or_path=path,
        **quantized,
    )
    return dict(
        type=VisionLanguageFinetune, llm=llm, lora=lora, freeze_projector=False,
        freeze_visual_encoder=bool(lora), processor=dict(type=load_processor, name_or_path=path),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["internvl_chat", "llava", "qwen2_5_vl", slow("gemma4")])
def test_state_of_models_of_images(kind, tmp_path):
    for method in ("full", "lora", "qlora"):
        if method == "qlora":
            pytest.importorskip("bitsandbytes")
        (tmp_path / method).mkdir()
        settings = vision_settings(kind, tmp_path / method, method)
        planned = state_sizes(build_planned_model(settings), "AdamW", 1.0)
        model = BUILDER.build(settings)
        assert (planned.trained, planned.frozen) == real_sizes(model), method
        assert planned.optimizer == real_optimizer_state(model), method
        assert (planned.quantized > 0) == (method == "qlora")


def test_dpo_has_a_reference(tmp_path):
    make_architecture("llama", attention="eager").save_pretrained(tmp_path)
    one = state_sizes(build_planned_model(settings_of(tmp_path, "full")), "AdamW", 1.0)
    settings = {**settings_of(tmp_path, "full"), "type": DPO}
    with_reference = state_sizes(build_planned_model(settings), "AdamW", 1.0)
    assert with_reference.trained == one.trained and with_reference.frozen == one.trained


SIZES = StateSizes(
    trained=4_000, frozen=600, quantized=200, trained_count=1_000, optimizer=8_000,
    largest_layer=100, root=50, count=1_200, computed=1_200, largest_quantized=0,
)  # fmt: skip
ACTIVATIONS = Activations(
    outside=0, layers=100_000, inputs=2_000, largest_layer=10_000, largest_tensor=0,
    largest_input=100,
)  # fmt: skip


SETTINGS = RunSettings(
    batch_size=1, sequences=1, length=8, accumulative_counts=1, epochs=1.0, iters=None,
    optimizer="AdamW", dtype="bfloat16", checkpointing=None, save_interval=None, kept=None,
    sharding=Sharding(),
)  # fmt: skip


def memory(**changes):
    settings = dataclasses.replace(SETTINGS, **changes)
    return memory_of(SIZES, ACTIVATIONS, settings, head=Head(4, 8, 0))


def state(**changes):
    found = memory(**changes)
    return found.weights, found.gradients, found.optimizer


def test_how_state_is_sharded():
    assert state() == (4_600, 4_000, 8_000)
    assert state(sharding=Sharding("ddp", 4)) == (4_600, 4_000, 8_000)
    # weights and gradients in two bytes, float32 copies and two states with the optimizer
    assert state(sharding=Sharding("zero1", 4)) == (2_600, 2_000, 3_000)
    assert state(sharding=Sharding("zero2", 4)) == (2_600, 500, 3_000)
    assert state(sharding=Sharding("zero3", 4)) == (650, 500, 3_000)
    # 4-bit weights are whole on each rank
    assert state(sharding=Sharding("fsdp", 4)) == (200 + 4_400 // 4, 1_000, 2_000)
    offloaded = Sharding("fsdp", 4, offload_optimizer=True, offload_weights=True)
    assert state(sharding=offloaded) == (200, 0, 0)


def test_checkpointing_keeps_inputs_and_one_layer():
    assert memory().activations == 100_000
    assert memory(checkpointing=Checkpointing()).activations == 12_000
    # 1,000 of inputs and 50,000 of the layers that are not recomputed
    assert memory(checkpointing=Checkpointing(every_n_layers=2)).activations == 61_000
    in_main_memory = memory(checkpointing=Checkpointing(offload=True))
    # two inputs stay: the one in use, and the next one
    assert in_main_memory.activations == 10_200 and in_main_memory.offloaded == 2_000


def test_the_loss_is_over_when_the_backward_pass_of_a_layer_begins():
    """Blocks of logits, and what a layer needs later, are not there at one time."""
    rows, vocabulary = 8, 8
    blocks = 2 * rows * vocabulary + 3 * 4 * rows * vocabulary
    hidden = rows * 4 * (2 + 4)
    assert memory().loss == hidden + blocks
    assert memory(checkpointing=Checkpointing()).loss == hidden  # a layer needs 10,000 bytes


def test_gathered_weights():
    assert memory(sharding=Sharding("ddp", 4)).temporary == 0
    assert memory(sharding=Sharding("fsdp", 4)).temporary == 2 * (2 * 100 + 50)


def state_of_bitsandbytes(optimizer, weight, monkeypatch):
    """Bytes that a real optimizer keeps for a weight, and those that would be paged on a GPU."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    made = getattr(bitsandbytes.optim, optimizer)([weight])
    paged = []
    plain = made.get_state_buffer

    def buffer(p, dtype=torch.float32):
        found = plain(p, dtype)
        if made.is_paged and p.numel() >= 1e5:  # bitsandbytes' own condition
            paged.append(found.nbytes)
        return found

    monkeypatch.setattr(made, "get_state_buffer", buffer)
    weight.grad = torch.ones_like(weight)
    made.step()
    values = made.state[weight].items()
    return sum(v.nbytes for k, v in values if torch.is_tensor(v) and "qmap" not in k), sum(paged)


@pytest.mark.parametrize(
    "optimizer", ["AdamW8bit", "PagedAdamW8bit", "PagedAdamW32bit", "Lion8bit"]
)
def test_states_of_bitsandbytes(optimizer, monkeypatch):
    for shape in ((50, 50), (100, 100), (400, 300)):
        weight = torch.nn.Parameter(torch.ones(shape))
        found = optimizer_bytes(weight, optimizer), paged_bytes(weight, optimizer)
        assert found == state_of_bitsandbytes(optimizer, weight, monkeypatch)


def test_paged_states_are_in_main_memory():
    sizes = dataclasses.replace(SIZES, paged=6_000)
    settings = dataclasses.replace(SETTINGS, optimizer="PagedAdamW32bit")
    found = memory_of(sizes, ACTIVATIONS, settings, head=Head(4, 8, 0))
    assert (found.optimizer, found.offloaded) == (2_000, 6_000)


def test_optimizers_that_are_not_fused_copy_the_weights():
    """In their step, when activations are gone: only what these do not cover counts."""
    fused, others = memory(length=1), memory(length=1, fused=False)
    assert others.temporary == fused.temporary  # 4,000 bytes are less than the activations
    few = dataclasses.replace(ACTIVATIONS, layers=1_000)
    settings = dataclasses.replace(SETTINGS, fused=False)
    found = memory_of(SIZES, few, settings, head=Head(4, 8, 0))
    assert found.temporary == 4_000 - found.activations - found.loss


def test_the_parts_are_the_total():
    found = memory(sharding=Sharding("zero2", 2))
    assert found.total == sum(size for _, size in found.parts()) > found.weights
