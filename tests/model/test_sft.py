"""SupervisedFinetune against plain transformers: loss and gradients, packed, padded, adapters."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from tests.helpers.architectures import make_architecture, make_config
from tests.helpers.tiers import slow
from tests.helpers.tiny import make_model, make_tokenizer, save_tiny
from xtuner.model import SupervisedFinetune
from xtuner.model.backends import cross_entropy as head_loss
from xtuner.model.backends.gpu import compiled
from xtuner.model.modules.attention import register
from xtuner.parallel.sequence.shard import SequenceShard
from xtuner.proving.training import plain_training, train_on
from xtuner.utils import cpu
from xtuner.utils.errors import UserError

IGNORED = -100
LENGTHS = (7, 1, 12, 5)


def samples(seed=0):
    """Rows of odd lengths; the first third of each, and all of the last, carry no label."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in LENGTHS:
        ids = torch.randint(3, 500, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 3 + 1] = IGNORED
        rows.append((ids, labels))
    rows[-1][1][:] = IGNORED
    return rows


def packed(rows):
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    return {
        "input_ids": torch.cat([ids for ids, _ in rows])[None],
        "labels": torch.cat([labels for _, labels in rows])[None],
        "position_ids": torch.cat([torch.arange(len(ids)) for ids, _ in rows])[None],
        "cumulative_len": [cu_seqlens],
        "max_seqlen": max(LENGTHS),
    }


def padded(rows, side):
    longest = max(LENGTHS)
    batch = {"input_ids": [], "labels": [], "attention_mask": [], "position_ids": []}
    for ids, labels in rows:
        missing = longest - len(ids)
        pad = (0, missing) if side == "right" else (missing, 0)
        fill = torch.nn.functional.pad
        batch["input_ids"].append(fill(ids, pad, value=2))
        batch["labels"].append(fill(labels, pad, value=IGNORED))
        batch["attention_mask"].append(fill(torch.ones_like(ids), pad))
        batch["position_ids"].append(fill(torch.arange(len(ids)), pad))
    return {name: torch.stack(value) for name, value in batch.items()}


def by_transformers(model, rows):
    """Each sample alone through transformers' own eager attention and full logits."""
    model = copy.deepcopy(model).eval()
    model.set_attn_implementation("eager")
    return plain_training(model, [{"input_ids": ids, "labels": labels} for ids, labels in rows])


ARCHITECTURES = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "gemma2": {
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "attn_logit_softcapping": 0.05,  # of the size of the scores of a tiny model
        "final_logit_softcapping": 0.05,
    },
    "cohere": {"logit_scale": 0.25},
    "phi3": {},
}


def build(arch):
    torch.manual_seed(0)
    register()
    name = "llama" if arch == "tied" else arch
    model = make_model(name, **ARCHITECTURES[arch])
    model.set_attn_implementation("xtuner")
    return model


@pytest.mark.parametrize("layout", ["packed", "rounded", "right", "left"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_loss_and_gradients_equal_plain_transformers(arch, layout, monkeypatch):
    if layout == "rounded":
        layout = "packed"
        monkeypatch.setattr(cpu, "FINEST_STEP", 2)
        assert SequenceShard(sum(LENGTHS), bucketed=True).tokens > sum(LENGTHS)
    llm = build(arch)
    rows = samples()
    expected = by_transformers(llm, rows)
    model = SupervisedFinetune(
        llm, use_varlen_attn=layout == "packed", use_activation_checkpointing=False
    )
    batch = packed(rows) if layout == "packed" else padded(rows, layout)
    counts = model.num_items(batch)
    assert counts == {"tokens": sum(int((labels[1:] != IGNORED).sum()) for _, labels in rows)}
    found = train_on(model, [batch])
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, value in expected.gradients.items():
        torch.testing.assert_close(
            found.gradients[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_every_architecture_here_skips_the_logits():
    """Otherwise the test above would only compare the plain path with itself."""
    for arch in ARCHITECTURES:
        model = SupervisedFinetune(build(arch))
        model(packed(samples()))
        assert model._separate_head, arch


def test_totals_make_shares_that_add_up():
    model = SupervisedFinetune(build("llama"), use_activation_checkpointing=False)
    rows = samples()
    whole = padded(rows, "right")
    parts = [{name: value[i : i + 1] for name, value in whole.items()} for i in range(len(rows))]
    num_items_in_batch = model.num_items(whole)
    shares = sum(model(part, num_items_in_batch=num_items_in_batch)["loss"] for part in parts)
    torch.testing.assert_close(shares, model(whole)["loss"])


def gradient(model, batch, autocast=False):
    """Loss and gradients of what is trained, as one vector in float64."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(batch)["loss"]
    loss.backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat([loss.detach().view(1), *grads]).double()


def flat(trained):
    """Loss and gradients as one vector."""
    parts = [torch.tensor([trained.loss]), *map(torch.flatten, trained.gradients.values())]
    return torch.cat(parts).double()


@pytest.mark.parametrize("layout", ["packed", "right"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_bf16_is_as_exact_as_plain_transformers_in_bf16(arch, layout):
    llm = build(arch).train(False)
    rows = samples()
    with torch.autocast("cpu", torch.bfloat16):
        plain = flat(by_transformers(llm, rows))
    exact = flat(by_transformers(llm, rows))
    model = SupervisedFinetune(llm, use_varlen_attn=layout == "packed").eval()
    found = gradient(model, packed(rows) if layout == "packed" else padded(rows, layout), True)
    assert (found - exact).norm() < 1.5 * (plain - exact).norm()


def test_smoothed_labels_are_the_same_with_all_logits():
    values = []
    for skips in (True, False):
        model = SupervisedFinetune(build("llama"), label_smoothing=0.1, z_loss=1e-2)
        model._separate_head = skips
        values.append(gradient(model, packed(samples())))
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-6)
    assert values[0][0] > gradient(SupervisedFinetune(build("llama")), packed(samples()))[0]


@pytest.mark.parametrize("checkpointing", [slow(False), True])
def test_compiled_layers_train_the_same_under_the_same_names(monkeypatch, checkpointing):
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(compiled, "BACKEND", counted)
    values, names = [], []
    for whole in (False, True):
        llm = build("llama")
        if whole:
            assert compiled.compile_layers(llm) == 2
        model = SupervisedFinetune(
            llm, use_varlen_attn=True, use_activation_checkpointing=checkpointing
        ).train()
        values.append(gradient(model, packed(samples())))
        names.append(list(model.state_dict()))
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-6)
    assert names[0] == names[1]
    assert graphs, "no layer was compiled"
    assert type(llm.model.layers[0]).__name__ == "LlamaDecoderLayer"


def test_activation_checkpointing_changes_no_gradient():
    grads = []
    for on in (False, True):
        llm = build("llama")
        SupervisedFinetune(llm, use_activation_checkpointing=on).train()(packed(samples()))[
            "loss"
        ].backward()
        grads.append({name: p.grad for name, p in llm.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def config_of(path, **settings):
    return dict(
        type=AutoModelForCausalLM.from_pretrained,
        pretrained_model_name_or_path=str(path),
        **settings,
    )


def test_lora_trains_and_saves_the_adapter_alone(tiny_llama, tmp_path):
    lora = dict(type=LoraConfig, r=4, lora_alpha=8, lora_dropout=0.0, task_type="CAUSAL_LM")
    model = SupervisedFinetune(config_of(tiny_llama, dtype=torch.float32), lora=lora)
    batch = packed(samples())
    model(batch)["loss"].backward()
    with torch.no_grad():  # a step
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter -= 0.5 * parameter.grad
    names = set(model.state_dict())
    assert names
    assert all(name.startswith("llm.") and "lora_" in name for name in names)
    assert not any("lm_head" in name for name in names)

    model.to_hf(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    stock = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = torch.arange(5, 25)[None]
    ours = model.eval()({"input_ids": ids}, mode="tensor").logits
    torch.testing.assert_close(stock(input_ids=ids).logits, ours, rtol=1e-4, atol=1e-4)


def test_a_full_model_saves_as_an_ordinary_folder(tiny_llama, tmp_path):
    model = SupervisedFinetune(config_of(tiny_llama), tokenizer=make_tokenizer())
    model.to_hf(tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(5, 25)[None]
    ours = model.eval()({"input_ids": ids}, mode="tensor").logits
    torch.testing.assert_close(stock(input_ids=ids).logits, ours, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_full_training_keeps_float32_weights(tmp_path):
    """In bfloat16 most updates would be rounded away; transformers 5 would load it so."""
    save_tiny(tmp_path / "half", dtype="bfloat16")
    model = SupervisedFinetune(config_of(tmp_path / "half"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def dequantised_twin(quantised, path):
    """A plain model with the same weights as the 4-bit one."""
    import bitsandbytes

    twin = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="xtuner"
    )
    layers = dict(quantised.named_modules())
    for name, module in twin.named_modules():
        layer = getattr(layers.get(name), "base_layer", layers.get(name))
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            state = layer.weight.quant_state
            plain = bitsandbytes.functional.dequantize_4bit(layer.weight.data, state)
            module.weight.data = plain.float().reshape(module.weight.shape)
    return twin


def test_qlora_gradients_equal_those_of_the_dequantised_model(tiny_llama):
    """Also after an evaluation: bitsandbytes repacks weights there, which broke the gradients."""
    from transformers import BitsAndBytesConfig

    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    lora = dict(type=LoraConfig, r=4, lora_dropout=0.0, task_type="CAUSAL_LM")
    model = SupervisedFinetune(
        config_of(tiny_llama, quantization_config=quantised, dtype=torch.float32), lora=lora
    )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    torch.manual_seed(1)
    for parameter in trained.values():
        torch.nn.init.normal_(parameter, std=0.1)
    twin = SupervisedFinetune(dequantised_twin(model.causal_lm, tiny_llama), lora=lora)
    twin.load_state_dict(model.state_dict(), strict=False)
    batch = packed(samples())
    with torch.no_grad():
        model.eval()(batch)
    losses = [either.train()(batch)["loss"] for either in (model, twin)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(trained[name].grad, parameter.grad, rtol=1e-3, atol=1e-4)


def test_a_model_built_before_keeps_its_4bit_layout(tiny_llama):
    """It was repacked by the first look at its logits, and trained with wrong gradients."""
    import bitsandbytes
    from transformers import BitsAndBytesConfig

    llm = AutoModelForCausalLM.from_pretrained(
        tiny_llama, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    model = SupervisedFinetune(llm, lora=dict(type=LoraConfig, r=4, target_modules=["q_proj"]))
    with torch.no_grad():
        model.eval()(packed(samples()))
    layers = [each for each in model.modules() if isinstance(each, bitsandbytes.nn.Linear4bit)]
    assert layers
    for layer in layers:
        assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


def test_new_tokens_start_as_the_mean_and_are_saved_with_an_adapter(tiny_llama):
    tokenizer = make_tokenizer(vocab_size=512)
    tokenizer.add_tokens([f"<new_{i}>" for i in range(600 - len(tokenizer))])
    model = SupervisedFinetune(
        config_of(tiny_llama),
        lora=dict(type=LoraConfig, r=4, task_type="CAUSAL_LM"),
        tokenizer=tokenizer,
    )
    embedding = model.causal_lm.get_input_embeddings().weight
    assert embedding.shape[0] == 640  # a multiple of 64
    torch.testing.assert_close(embedding[600], embedding[:512].mean(0))
    assert any("embed_tokens" in name for name in model.state_dict())
    assert any("lm_head" in name for name in model.state_dict())


def test_a_longer_context_scales_the_rotary_embedding(tiny_llama):
    model = SupervisedFinetune(config_of(tiny_llama), max_position_embeddings=1300)
    assert model.llm.config.max_position_embeddings == 1300
    assert model.llm.config.rope_parameters["rope_type"] == "linear"
    assert model.llm.config.rope_parameters["factor"] == 3.0


def test_a_longer_context_without_a_rotary_embedding_is_refused(tmp_path):
    make_model("gpt2", n_positions=64).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="the context of gpt2 cannot be extended"):
        SupervisedFinetune(config_of(tmp_path), max_position_embeddings=1300)


@pytest.mark.parametrize("kind", ["recurrent_gemma", "xlstm", "gemma2"])
def test_a_bound_of_the_logits_is_known_by_each_name_or_its_effect(kind, monkeypatch):
    llm = make_architecture(kind, attention="eager").eval()
    ids = torch.arange(5, 14)[None]
    batch = {"input_ids": ids, "labels": ids}
    wanted = llm(input_ids=ids, labels=ids, use_cache=False).loss
    for names in (head_loss.SOFT_CAPS, ()):  # without names its logits are taken
        monkeypatch.setattr(head_loss, "SOFT_CAPS", names)
        model = SupervisedFinetune(llm, use_activation_checkpointing=False).eval()
        loss = model(batch, mode="loss")["loss"]
        torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
        assert model.can_skip_logits(batch) == bool(names)


def test_a_bound_of_the_logits_in_the_config_of_the_language_model_is_known():
    config = make_config("mistral_large4", final_logit_softcapping=0.5)
    llm = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    ids = torch.arange(5, 14)[None]
    batch = {"input_ids": ids, "labels": ids}
    model = SupervisedFinetune(llm, use_activation_checkpointing=False).eval()
    loss = model(batch, mode="loss")["loss"]
    wanted = llm(input_ids=ids, labels=ids, use_cache=False).loss
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    assert model.can_skip_logits(batch) and model.logit_transform.softcap == 0.5
