"""`xtuner convert merge`: its result in stock transformers is base + adapter in stock peft."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.parts_of_bases import add_mtp, save_with_vision
from tests.helpers.tiny import make_model, make_tokenizer, save_tiny
from xtuner.entry_point import main
from xtuner.export import verify
from xtuner.export.fingerprint import write_fingerprint
from xtuner.export.shards import ShardWriter
from xtuner.export.streaming_merge import prepare_streaming_merge
from xtuner.export.verify_streamed import check_merged
from xtuner.export.weights import Weights

PROBE = torch.arange(40).reshape(2, 20) * 7 % 500


def adapter_on(base: Path, folder: Path, config: Any, resize: int = 0) -> Path:
    """Save an adapter whose every trainable number is away from its start."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if resize:
        model.resize_token_embeddings(resize, mean_resizing=False)
    model = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(PROBE).logits


def base_plus_adapter(base: Path, adapter: Path, resize: int = 0) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if resize:
        model.resize_token_embeddings(resize, mean_resizing=False)
    return logits(PeftModel.from_pretrained(model, adapter))


def merged_logits(folder: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


CONFIGS = {
    "lora": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "rslora": LoraConfig(r=4, target_modules=["q_proj"], use_rslora=True, task_type="CAUSAL_LM"),
    "rank_pattern": LoraConfig(
        r=4,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 2},
        alpha_pattern={"down_proj": 32},
        task_type="CAUSAL_LM",
    ),
    "dora": LoraConfig(r=4, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM"),
    "pissa": LoraConfig(
        r=4, target_modules=["q_proj"], init_lora_weights="pissa", task_type="CAUSAL_LM"
    ),
    "modules_to_save": LoraConfig(
        r=4,
        target_modules=["q_proj"],
        modules_to_save=["lm_head", "embed_tokens"],
        task_type="CAUSAL_LM",
    ),
    "embedding": LoraConfig(r=4, target_modules=["embed_tokens"], task_type="CAUSAL_LM"),
    "loha": LoHaConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "lokr": LoKrConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "ia3": IA3Config(
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    ),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_merged_layer_by_layer_equals_base_plus_adapter(kind, tiny_llama, tmp_path, capsys):
    adapter = adapter_on(tiny_llama, tmp_path / "adapter", CONFIGS[kind])
    out = tmp_path / "merged"
    assert main(["convert", "merge", str(tiny_llama), str(adapter), str(out)]) == 0
    expected = base_plus_adapter(tiny_llama, adapter)
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(tiny_llama))).abs().max() > 1e-3
    torch.testing.assert_close(merged_logits(out), expected, atol=2e-5, rtol=1e-4)
    said = capsys.readouterr().out
    assert "full model in memory" not in said
    assert "verified" in said and f"vllm serve {out}" in said
    check_merged(prepare_streaming_merge(Weights(tiny_llama), adapter, None, "cpu"), out)


def test_bias_of_the_base_and_of_the_adapter(tmp_path):
    base = save_tiny(tmp_path / "base", "qwen2")
    config = LoraConfig(r=4, target_modules=["q_proj"], bias="lora_only", task_type="CAUSAL_LM")
    adapter = adapter_on(base, tmp_path / "adapter", config)
    assert main(["convert", "merge", str(base), str(adapter), str(tmp_path / "out")]) == 0
    torch.testing.assert_close(
        merged_logits(tmp_path / "out"), base_plus_adapter(base, adapter), atol=2e-5, rtol=1e-4
    )


def test_weights_drawn_by_functions_without_a_device_are_the_bases(tmp_path):
    """DiffLlama draws by ``torch.normal``, which gives numbers on the meta device, too."""
    base = save_tiny(tmp_path / "base", "diffllama")
    adapter = adapter_on(base, tmp_path / "adapter", CONFIGS["lora"])
    out = tmp_path / "out"
    assert main(["convert", "merge", str(base), str(adapter), str(out), "--no-verify"]) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (base, out))
    drawn = [name for name in before if ".lambda_" in name]
    assert drawn and all(torch.equal(before[name], after[name]) for name in drawn)
    torch.testing.assert_close(
        merged_logits(out), base_plus_adapter(base, adapter), atol=2e-5, rtol=1e-4
    )


def test_what_cannot_be_merged_by_layer_is_merged_whole_and_said(tiny_llama, tmp_path, capsys):
    config = VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapter = adapter_on(tiny_llama, tmp_path / "adapter", config)
    out = tmp_path / "out"
    assert main(["convert", "merge", str(tiny_llama), str(adapter), str(out)]) == 0
    assert "full model in memory" in capsys.readouterr().out
    torch.testing.assert_close(
        merged_logits(out), base_plus_adapter(tiny_llama, adapter), atol=2e-5, rtol=1e-4
    )


def test_a_mixture_of_experts_is_merged_whole(tmp_path, capsys):
    base = save_tiny(tmp_path / "base", "mixtral", num_local_experts=2, num_experts_per_tok=1)
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    mtp = add_mtp(base)
    adapter = adapter_on(base, tmp_path / "adapter", config)
    out = tmp_path / "out"
    words = ["convert", "merge", str(base), str(adapter), str(out), "--max-shard-size", "100KB"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "full model in memory" in said and "copied from the base" in said
    assert all(torch.equal(Weights(out).read(name), mtp[name]) for name in mtp)
    assert len(list(out.glob("*.safetensors"))) > 1
    torch.testing.assert_close(
        merged_logits(out), base_plus_adapter(base, adapter), atol=2e-5, rtol=1e-4
    )


def classifier_on(base: Path, adapter: Path, labels: int) -> Any:
    """Save an adapter with a new head on a base, and return the model."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)
    config = LoraConfig(
        r=4, target_modules=["q_proj"], task_type="SEQ_CLS", init_lora_weights=False
    )
    model = get_peft_model(model, config)
    model.save_pretrained(adapter)
    return model


def test_a_classifiers_new_head_comes_along(tiny_llama, tmp_path):
    from transformers import AutoModelForSequenceClassification

    model = classifier_on(tiny_llama, tmp_path / "adapter", 2)
    out = tmp_path / "out"
    words = ["convert", "merge", str(tiny_llama), str(tmp_path / "adapter"), str(out)]
    assert main(words) == 0
    found = AutoModelForSequenceClassification.from_pretrained(out)
    torch.testing.assert_close(logits(found), logits(model))


def test_new_tokens_come_along(tiny_llama, tmp_path):
    config = LoraConfig(
        r=4,
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens", "lm_head"],
        task_type="CAUSAL_LM",
    )
    adapter = adapter_on(tiny_llama, tmp_path / "adapter", config, resize=576)
    out = tmp_path / "out"
    assert main(["convert", "merge", str(tiny_llama), str(adapter), str(out)]) == 0
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 576
    torch.testing.assert_close(
        merged_logits(out), base_plus_adapter(tiny_llama, adapter, 576), atol=2e-5, rtol=1e-4
    )


def test_dtype_is_the_bases_or_the_one_asked_for(tmp_path):
    torch.manual_seed(0)
    base = tmp_path / "base"
    make_model().to(torch.bfloat16).save_pretrained(base, max_shard_size="100KB")
    make_tokenizer().save_pretrained(base)
    adapter = adapter_on(base, tmp_path / "adapter", CONFIGS["lora"])
    for flags, dtype in ([], torch.bfloat16), (["--dtype", "fp32"], torch.float32):
        out = tmp_path / f"out{len(flags)}"
        words = ["convert", "merge", str(base), str(adapter), str(out), "--max-shard-size", "80KB"]
        assert main(words + flags) == 0
        assert {info.dtype for info in Weights(out).infos.values()} == {dtype}
        assert len(list(out.glob("*.safetensors"))) > 1
        assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == dtype
        assert len(AutoTokenizer.from_pretrained(out)) == len(make_tokenizer())


def test_bin_shards_are_read_and_written(tiny_llama, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(
        AutoModelForCausalLM.from_pretrained(tiny_llama).state_dict(), base / "pytorch_model.bin"
    )
    adapter = adapter_on(tiny_llama, tmp_path / "adapter", CONFIGS["lora"])
    out = tmp_path / "out"
    words = ["convert", "merge", str(base), str(adapter), str(out), "--no-safe-serialization"]
    assert main(words) == 0
    assert list(out.glob("*.bin")) and not list(out.glob("*.safetensors"))
    torch.testing.assert_close(
        merged_logits(out), base_plus_adapter(tiny_llama, adapter), atol=2e-5, rtol=1e-4
    )


def refused(words: list[str], capsys: Any, out: Path) -> str:
    status = main(words)
    said = capsys.readouterr().err
    assert status != 0 and "Traceback" not in said
    assert not [entry.name for entry in out.parent.iterdir() if entry.name.startswith(".")]
    return said


def test_another_base_is_refused(tiny_llama, tmp_path, capsys):
    adapter = adapter_on(tiny_llama, tmp_path / "adapter", CONFIGS["lora"])
    write_fingerprint(adapter, "my/base", Weights(tiny_llama))
    sibling = save_tiny(tmp_path / "sibling", seed=5)
    out = tmp_path / "out"
    words = ["convert", "merge", str(sibling), str(adapter), str(out)]
    said = refused(words, capsys, out)
    assert "trained on my/base" in said and "other weights" in said and "--force" in said
    assert not out.exists()
    assert main([*words, "--force"]) == 0
    wider = save_tiny(tmp_path / "wider", hidden_size=96)
    (adapter / "xtuner_base.json").unlink()
    said = refused(["convert", "merge", str(wider), str(adapter), str(tmp_path / "x")], capsys, out)
    assert "does not fit" in said


@pytest.mark.parametrize("harm", ["cut", "header", "missing_shard", "missing_tensor"])
def test_a_damaged_base_is_refused(harm, tmp_path, capsys):
    base = save_tiny(tmp_path / "base")
    adapter = adapter_on(base, tmp_path / "adapter", CONFIGS["lora"])
    file = base / "model.safetensors"
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif harm == "header":
        file.write_bytes(b"\xff" * 200)
    elif harm == "missing_shard":
        index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        from safetensors.torch import load_file, save_file

        tensors = load_file(file)
        del tensors["model.layers.1.mlp.down_proj.weight"]
        save_file(tensors, file)
    out = tmp_path / "out"
    said = refused(["convert", "merge", str(base), str(adapter), str(out)], capsys, out)
    expected = {
        "cut": "model.safetensors: this file of weights is damaged",
        "header": "model.safetensors: this file of weights is damaged",
        "missing_shard": "model-00001-of-00002.safetensors",
        "missing_tensor": "lacks tensors: model.layers.1.mlp.down_proj.weight",
    }
    assert expected[harm] in said
    assert not out.exists()


def test_an_adapter_with_a_missing_tensor_is_refused(tiny_llama, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    adapter = adapter_on(tiny_llama, tmp_path / "adapter", CONFIGS["lora"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    save_file(tensors, adapter / "adapter_model.safetensors")
    out = tmp_path / "out"
    said = refused(["convert", "merge", str(tiny_llama), str(adapter), str(out)], capsys, out)
    assert "lacks tensors" in said and "layers.0.self_attn.q_proj.lora_A" in said


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("[]", "this holds list; an object is expected"),
        ('{"peft_type": "NOPE"}', "adapter_config.json: this adapter's config cannot be used"),
        ('{"peft_type": "LORA", "r": "x"}', "the adapter does not fit the base"),
        ("{", "this is not JSON"),
    ],
)
def test_a_damaged_config_of_an_adapter_is_refused(settings, words, tiny_llama, tmp_path, capsys):
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    shutil.copytree(adapter_on(tiny_llama, tmp_path / "whole", CONFIGS["lora"]), adapter)
    (adapter / "adapter_config.json").write_text(settings)
    words_of = {
        "merge": ["convert", "merge", str(tiny_llama), str(adapter), str(out)],
        "chat": ["chat", str(tiny_llama), "--adapter", str(adapter)],
    }
    said = refused(words_of["merge"], capsys, out)
    assert words in said
    assert words.replace("the base", "this model") in refused(words_of["chat"], capsys, out)


def test_a_pickled_adapter_is_refused_without_torchs_advice(tiny_llama, tmp_path, capsys):
    adapter, out = adapter_on(tiny_llama, tmp_path / "adapter", CONFIGS["lora"]), tmp_path / "out"
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"a": torch.nn.Linear(2, 2)}, adapter / "adapter_model.bin")
    said = refused(["convert", "merge", str(tiny_llama), str(adapter), str(out)], capsys, out)
    assert "nothing from it was run" in said and "weights_only" not in said


def test_wrong_folders_are_refused(tiny_llama, tmp_path, capsys, monkeypatch):
    adapter = adapter_on(tiny_llama, tmp_path / "adapter", CONFIGS["lora"])
    out = tmp_path / "out"
    cases = {
        "there is no model folder": ["./nowhere", str(adapter), str(out)],
        "it is an adapter": [str(adapter), str(adapter), str(out)],
        "it is a full model": [str(tiny_llama), str(tiny_llama), str(out)],
        "is also an input": [str(tiny_llama), str(adapter), str(adapter)],
        "cannot be fetched": ["nobody/nothing-here", str(adapter), str(out)],
        "not a shard size": [str(tiny_llama), str(adapter), str(out), "--max-shard-size", "big"],
    }
    for text, words in cases.items():
        assert text in refused(["convert", "merge", *words], capsys, out)
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("mine")
    said = refused(["convert", "merge", str(tiny_llama), str(adapter), str(full)], capsys, out)
    assert "not empty" in said and (full / "thesis.tex").exists()
    usage = shutil._ntuple_diskusage(10, 9, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    said = refused(["convert", "merge", str(tiny_llama), str(adapter), str(out)], capsys, out)
    assert "only 0.00 MB are free" in said


TIED = {
    "head": LoraConfig(r=4, target_modules=["q_proj", "lm_head"]),
    "embedding": LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]),
    "both": LoraConfig(r=4, target_modules=["lm_head", "embed_tokens"]),
    "saved head": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("kind", TIED)
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_an_adapter_on_one_of_two_tied_weights_unties_them(kind, tmp_path, capsys):
    base = save_tiny(tmp_path / "base", "qwen3", tie_word_embeddings=True)
    assert "lm_head.weight" not in Weights(base).infos
    adapter, out = adapter_on(base, tmp_path / "adapter", TIED[kind]), tmp_path / "out"
    assert main(["convert", "merge", str(base), str(adapter), str(out)]) == 0
    said = capsys.readouterr()
    assert "embedding and head are no longer tied" in said.out and "Warning" not in said.err
    assert json.loads((out / "config.json").read_text("utf-8"))["tie_word_embeddings"] is False
    assert "lm_head.weight" in Weights(out).infos
    torch.testing.assert_close(
        merged_logits(out), base_plus_adapter(base, adapter), rtol=1e-4, atol=1e-4
    )


def changing(monkeypatch: Any, change: str) -> None:
    """Let each tensor of this name be written with another number in it."""
    write = ShardWriter.write

    def wrong(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        tensor = tensor.clone()
        if change in name:
            tensor.view(-1)[-1] += 0.5
        write(self, name, tensor)

    monkeypatch.setattr(ShardWriter, "write", wrong)


@pytest.mark.parametrize("change", ["", "norm.weight", "q_proj.weight", "lm_head.weight"])
def test_a_large_model_is_verified_by_its_files(change, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(verify, "AUTO_VERIFY_BYTES", 0)
    base = save_tiny(tmp_path / "base", "qwen3", tie_word_embeddings=True)
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    adapter, out = adapter_on(base, tmp_path / "adapter", config), tmp_path / "merged"
    if change:
        changing(monkeypatch, change)
    status = main(["convert", "merge", str(base), str(adapter), str(out), "--dtype", "bf16"])
    assert status == bool(change) and out.exists() == (not change)
    said = capsys.readouterr()
    if change:
        assert change in said.err and "are not those of the expected model" in said.err
    else:
        assert "tensors were read again" in said.out


def test_an_adapter_elsewhere_leaves_weights_tied(tmp_path):
    base = save_tiny(tmp_path / "base", "qwen3", tie_word_embeddings=True)
    adapter, out = adapter_on(base, tmp_path / "adapter", CONFIGS["lora"]), tmp_path / "out"
    assert main(["convert", "merge", str(base), str(adapter), str(out)]) == 0
    assert json.loads((out / "config.json").read_text("utf-8"))["tie_word_embeddings"] is True
    assert "lm_head.weight" not in Weights(out).infos


def test_in_memory_it_is_refused(tmp_path, capsys, monkeypatch):
    from xtuner.export import streaming_merge

    monkeypatch.setattr(streaming_merge, "STREAMED", ())
    base = save_tiny(tmp_path / "base", "qwen3", tie_word_embeddings=True)
    adapter = adapter_on(base, tmp_path / "adapter", TIED["head"])
    words = ["convert", "merge", str(base), str(adapter), str(tmp_path / "out")]
    assert "the base ties its embedding and head" in refused(words, capsys, tmp_path / "out")


def test_an_adapter_of_the_text_class_fits_a_folder_with_vision(tmp_path, capsys):
    """Its tensors have a longer prefix there; what belongs to vision stays as it is."""
    base, adapter, merged = (tmp_path / name for name in ("base", "adapter", "merged"))
    save_with_vision(base)
    llm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = LoraConfig(
        r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    get_peft_model(llm, lora).save_pretrained(adapter)
    assert main(["convert", "merge", str(base), str(adapter), str(merged)]) == 0
    assert "verified" in capsys.readouterr().out
    before, after = (load_file(folder / "model.safetensors") for folder in (base, merged))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"model.language_model.layers.0.self_attn.q_proj.weight"}
    settings = json.loads((merged / "config.json").read_text("utf-8"))
    assert settings["architectures"] == ["Qwen3_5ForConditionalGeneration"]
