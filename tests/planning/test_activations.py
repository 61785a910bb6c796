"""What a forward pass is planned to keep, beside what torch's hooks count on a real model."""

import functools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForImageTextToText
from transformers.modeling_layers import GradientCheckpointingLayer

from tests.helpers.architectures import make_architecture, make_config
from tests.helpers.hub_models import MODELS
from tests.helpers.image_text import image_text_folder, make_image, processed
from tests.helpers.tiers import slow
from xtuner.model import SupervisedFinetune, VisionLanguageFinetune
from xtuner.model.activation_checkpointing import (
    Checkpointing,
    disable_activation_checkpointing,
    enable_activation_checkpointing,
)
from xtuner.model.backends.cpu import fused_layers
from xtuner.model.modules import image_rows
from xtuner.model.transformers_models.auto import AutoConfig, AutoModelForCausalLM
from xtuner.planning import stand_ins
from xtuner.planning.activations import trace_activations, trace_image
from xtuner.tokenization.processor import load_processor
from xtuner.utils.errors import UserError

LENGTHS = (16, 64, 160)
KINDS = ("llama", "qwen3", "gemma2", "phi3", "glm4", "mixtral")


@pytest.fixture(autouse=True)
def without_cpu_kernels(monkeypatch):
    """The plan is of a GPU; the functions of a CPU keep less."""
    monkeypatch.setattr(fused_layers, "_compute_dtype", lambda x: None)


def adapter():
    return LoraConfig(r=4, lora_dropout=0.1, task_type="CAUSAL_LM")


def storages(tensors):
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def bytes_kept(model, forward, besides=()):
    """Of the storages that autograd keeps of a forward pass, weights and ``besides`` left out.

    Operations that the output does not depend on have released theirs when it is there.
    """
    own = storages([*model.parameters(), *model.buffers(), *besides])
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[StorageWeakRef(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()
    assert output.requires_grad
    return sum(size for storage, size in kept.items() if not storage.expired())


def real_bytes(llm, **inputs):
    inputs = {"attention_mask": torch.zeros(1, 1, 1, 1), "use_cache": False, **inputs}
    return bytes_kept(llm, lambda: llm.base_model(**inputs).last_hidden_state)


def real_bytes_recomputed(llm, **inputs):
    """With checkpointing: what is kept, and on top what the layer keeps that keeps most."""
    calls = {}

    def note(layer, args, kwargs):
        calls[layer] = (args[0].detach().requires_grad_(), kwargs)

    layers = [m for m in llm.modules() if isinstance(m, GradientCheckpointingLayer)]
    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    real_bytes(llm, **inputs)
    for handle in handles:
        handle.remove()
    in_layers = []
    for layer, (hidden, kwargs) in calls.items():
        given = [hidden, *(t for t in tree_leaves(kwargs) if isinstance(t, torch.Tensor))]
        in_layers.append(bytes_kept(layer, functools.partial(layer, hidden, **kwargs), given))
    enable_activation_checkpointing(llm)
    return real_bytes(llm, **inputs) + max(in_layers)


def planned(kind, length, *, lora, layers=2):
    with torch.device("meta"):
        llm = make_architecture(kind, attention=stand_ins.NAME, num_hidden_layers=layers)
        model = SupervisedFinetune(
            llm, lora=adapter() if lora else None, use_activation_checkpointing=False
        )
    return trace_activations(
        model, model.causal_lm, batch_size=2, length=length, autocast=torch.float32
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [False, True])
def test_kept_as_by_a_real_model(kind, lora):
    stand_ins.register()
    llm = make_architecture(kind, attention=stand_ins.NAME)
    model = SupervisedFinetune(
        llm, lora=adapter() if lora else None, use_activation_checkpointing=False
    )
    rows = [torch.zeros(2, length, dtype=torch.long) for length in LENGTHS]
    plans = [planned(kind, length, lora=lora) for length in LENGTHS]
    for ids, found in zip(rows, plans, strict=True):
        real = real_bytes(model.causal_lm, input_ids=ids)
        assert found.kept(None) == pytest.approx(real, rel=0.1)
    for ids, found in zip(rows, plans, strict=True):
        real = real_bytes_recomputed(model.causal_lm, input_ids=ids)
        assert found.kept(Checkpointing()) == pytest.approx(real, rel=0.1)
        disable_activation_checkpointing(model)


def test_a_config_that_recomputes_is_counted_as_one_that_does_not():
    """Checkpointing's own hooks would take what the layers keep."""
    stand_ins.register()
    found = []
    for checkpointing in (True, False):
        with torch.device("meta"):
            llm = make_architecture("llama", attention=stand_ins.NAME)
            model = SupervisedFinetune(llm, use_activation_checkpointing=checkpointing)
        found.append(
            trace_activations(
                model, model.causal_lm, batch_size=1, length=16, autocast=torch.float32
            )
        )
    assert found[0] == found[1] and found[0].largest_layer > 0


def test_layers_that_are_alike_run_once():
    two, ten = (planned("llama", 32, lora=True, layers=count) for count in (2, 10))
    assert ten.layers == 5 * two.layers and ten.inputs == 5 * two.inputs
    assert ten.outside == two.outside and ten.largest_layer == two.largest_layer


def test_checkpointing_keeps_the_inputs_of_layers():
    found = planned("llama", 64, lora=True)
    width = make_config("llama").hidden_size
    assert found.inputs == 2 * (2 * 64 * width * 4)
    assert found.kept(Checkpointing()) < found.kept(None)
    assert found.of_batches(3).kept(Checkpointing()) == 3 * found.kept(Checkpointing())


def test_autocast_halves_what_products_keep():
    with torch.device("meta"):
        llm = make_architecture("llama", attention=stand_ins.NAME)
        full = SupervisedFinetune(llm, use_activation_checkpointing=False)
    half = trace_activations(full, full.causal_lm, batch_size=2, length=64, autocast=torch.bfloat16)
    assert half.layers < planned("llama", 64, lora=False).layers


def test_a_peft_model_of_ones_own():
    stand_ins.register()
    with torch.device("meta"):
        llm = get_peft_model(make_architecture("llama", attention=stand_ins.NAME), adapter())
    found = trace_activations(
        llm, llm.get_base_model(), batch_size=1, length=16, autocast=torch.float32
    )
    assert found.layers > 0


@pytest.mark.parametrize(
    "kind", ["gemma3", "mistral3", "qwen3_5", "bloom", "opt", "mamba", "gpt_oss", "nemotron_h"]
)
def test_classes_of_other_kinds(kind):
    """Vision towers that text does not reach, masks of their own, no attention, experts."""
    stand_ins.register()
    with torch.device("meta"):
        model = SupervisedFinetune(
            make_architecture(kind, attention=stand_ins.NAME), use_activation_checkpointing=False
        )
    found = trace_activations(
        model, model.causal_lm, batch_size=1, length=16, autocast=torch.bfloat16
    )
    assert found.layers > found.inputs > 0


def test_experts_in_a_list():
    """A token passes its two experts and the shared ones, whichever they are."""
    model = MODELS["deepseek"]
    fields = {**model.sizes, **model.config}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    kept = {}
    for chosen in (1, 2):
        config.num_experts_per_tok = chosen
        config._attn_implementation = stand_ins.NAME
        with torch.device("meta"):
            llm = AutoModelForCausalLM.from_config(config)
        found = trace_activations(llm, llm, batch_size=1, length=16, autocast=torch.float32)
        kept[chosen] = found.layers
    assert kept[2] > kept[1] > 0


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    "kind",
    ["qwen2_5_vl", slow("qwen3_vl"), "gemma3", slow("gemma4"), slow("internvl"), slow("smolvlm")],
)
def test_a_trained_visual_encoder_keeps_as_a_real_one(kind, lora):
    """Rows full of images, of the whole model beside the sum of both counts."""
    stand_ins.register()

    def build(device):
        folder = str(image_text_folder(kind))
        config = AutoConfig.from_pretrained(folder)
        with torch.device(device):
            return VisionLanguageFinetune(
                AutoModelForImageTextToText.from_config(config, attn_implementation=stand_ins.NAME),
                processor=load_processor(folder),
                lora=adapter() if lora else None,
                freeze_visual_encoder=False,
                freeze_projector=False,
                use_activation_checkpointing=False,
            )

    model = build("cpu")
    for count in (2, 6):
        images = [make_image(56, 56, seed) for seed in range(count)]
        text = "a".join([model.processor.image_token] * count)
        batch = processed(model.processor, [(text, images)])
        names = image_rows.arguments(model.causal_lm.base_model.forward)
        inputs = {name: value for name, value in batch.items() if name in names}
        inputs["attention_mask"] = batch["attention_mask"]
        real = real_bytes(model.causal_lm, **inputs)
        found = build("meta")
        encode, _ = found.encode_blank(56)
        length = batch["input_ids"].shape[1]
        of_image = trace_image(found, encode, autocast=torch.float32)
        assert of_image is not None
        expected = trace_activations(
            found, found.causal_lm, batch_size=1, length=length, autocast=torch.float32
        ).with_images(of_image.of_batches(count))
        planned_bytes = expected.kept(None)
        assert planned_bytes == pytest.approx(real, rel=0.1), (length, planned_bytes, real)
        assert of_image.kept(Checkpointing()) < of_image.kept(None)


def test_a_forward_that_depends_on_values(monkeypatch):
    llm = make_architecture("llama", attention=stand_ins.NAME)
    original = type(llm.model).forward

    def forward(self, input_ids, **kwargs):
        if int(input_ids.max()) > 3:
            raise AssertionError
        return original(self, input_ids, **kwargs)

    monkeypatch.setattr(type(llm.model), "forward", forward)
    with pytest.raises(UserError, match="LlamaForCausalLM cannot be counted"):
        trace_activations(llm, llm, batch_size=1, length=16, autocast=torch.float32)
