"""`xtuner convert pth_to_hf`: what it writes is, in stock libraries, the trained model."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.own_llm import OwnForCausalLM
from tests.helpers.parts_of_bases import add_mtp, save_with_vision
from tests.helpers.tiers import slow
from tests.helpers.tiny import make_model, make_tokenizer, save_tiny
from xtuner.config import load_config
from xtuner.entry_point import main
from xtuner.export import verify, verify_streamed
from xtuner.export.trained_weights import TrainedWeights
from xtuner.export.weights import Weights
from xtuner.registry import BUILDER

PROBE = torch.arange(40).reshape(2, 20) * 7 % 500

CONFIG = """
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from tests.helpers.contract_model import ContractModel
from xtuner.utils import PROMPT_TEMPLATE

path = {base!r}
prompt_template = PROMPT_TEMPLATE.{template}
tokenizer = dict(type=AutoTokenizer.from_pretrained, pretrained_model_name_or_path=path)
model = dict(
    type=ContractModel,
    llm=dict(type=AutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path=path),
    {lora}
)
train_dataset = dict(template_map_fn=dict(type=dict, template=prompt_template))
"""
LORA = """lora=dict(
        type=LoraConfig, r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM",
        modules_to_save={save}),"""


OWN_MODEL = "from xtuner.model import SupervisedFinetune as ContractModel"


def trained(
    folder: Path,
    base: Path,
    lora: str = "",
    template: str = "qwen_chat",
    dtype: Any = None,
    imported: str = "from tests.helpers.contract_model import ContractModel",
) -> Any:
    """Write ``config.py`` and ``iter_1.pth`` into a work dir and return the model as trained."""
    folder.mkdir(exist_ok=True)
    text = CONFIG.format(base=str(base), lora=lora, template=template)
    text = text.replace("from tests.helpers.contract_model import ContractModel", imported)
    (folder / "config.py").write_text(text)
    model = BUILDER.build(load_config(str(folder / "config.py")).model)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    if dtype is not None:
        model.to(dtype)
    torch.save({"meta": {}, "state_dict": model.state_dict()}, folder / "iter_1.pth")
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval().float()(PROBE).logits


def convert(work: Path, out: Path, *flags: str) -> int:
    return main(["convert", "pth_to_hf", str(work / "iter_1.pth"), str(out), *flags])


@pytest.fixture
def work(tmp_path) -> Path:
    return tmp_path / "work"


def test_full_model(work, tiny_llama, tmp_path, capsys):
    model = trained(work, tiny_llama)
    out = tmp_path / "hf"
    assert convert(work, out, "--max-shard-size", "100KB") == 0
    said = capsys.readouterr().out
    assert "verified" in said and f"xtuner chat {out}" in said
    stock = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert stock.dtype == torch.float32
    assert torch.equal(logits(stock), logits(model.llm))
    assert len(list(out.glob("*.safetensors"))) > 2
    assert (out / "xtuner_config.py").read_text() == (work / "config.py").read_text()
    tokenizer = AutoTokenizer.from_pretrained(out)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stock.generation_config.eos_token_id[0] == stop
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert main(["check-template", str(out)]) == 0


OWN = "llm=dict(type=AutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path=path)"


@pytest.mark.parametrize("large", [False, slow(True)])
@pytest.mark.parametrize("how", ["make", "load"])
def test_a_model_that_a_function_makes(how, large, work, tiny_llama, tmp_path, monkeypatch, capsys):
    """Of a class that transformers does not know, and on the meta device or only with weights."""
    text = CONFIG.replace(OWN, f"llm=dict(type={how}, path=path)")
    text = f"from tests.helpers.own_llm import {how}\n{text}"
    monkeypatch.setattr(sys.modules[__name__], "CONFIG", text)
    model = trained(work, tiny_llama)
    monkeypatch.setattr(verify, "AUTO_VERIFY_BYTES", 0 if large else 10**9)
    assert convert(work, tmp_path / "hf") == 0
    said = capsys.readouterr().out
    assert ("tensors were read again" if large else "largest difference of logits") in said
    stock = OwnForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert torch.equal(logits(stock), logits(model.llm))
    if not large:
        trained(work, tiny_llama, LORA.format(save=[]))
        assert convert(work, tmp_path / "adapter") == (1 if how == "make" else 0)
        assert how == "load" or "no folder is its base" in capsys.readouterr().err


@pytest.mark.parametrize("lora", ["", LORA.format(save=["embed_tokens", "lm_head"])])
def test_a_large_model_is_verified_by_its_files(
    lora, work, tiny_llama, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(verify, "AUTO_VERIFY_BYTES", 0)
    trained(work, tiny_llama, lora)
    assert convert(work, tmp_path / "hf", "--dtype", "bf16") == 0
    assert "tensors were read again" in capsys.readouterr().out
    write = verify_streamed.check_trained

    def damaged(trained: Any, folder: Path, *rest: Any) -> None:
        (file,) = folder.glob("*.safetensors")
        tensors = load_file(file)
        next(iter(tensors.values())).view(-1)[0] += 1
        save_file(tensors, file, metadata={"format": "pt"})
        write(trained, folder, *rest)

    monkeypatch.setattr(verify_streamed, "check_trained", damaged)
    assert convert(work, tmp_path / "wrong") == 1
    assert "are not those of the expected model" in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_what_training_does_not_build_is_copied_from_the_base(kind, work, tmp_path, capsys):
    """Also where transformers converts the weights, of experts, as it saves them."""
    base = save_tiny(tmp_path / "base", kind)
    mtp = add_mtp(base)
    trained(work, base, imported=OWN_MODEL)
    own = set(Weights(base).infos) - set(mtp)
    assert convert(work, tmp_path / "hf", "--dtype", "bf16") == 0
    assert "copied from the base" in capsys.readouterr().out
    weights = Weights(tmp_path / "hf")
    for name, tensor in mtp.items():
        assert torch.equal(weights.read(name), tensor.to(torch.bfloat16))
    assert set(weights.infos) == own | set(mtp)
    _, found = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not found["missing_keys"] and set(found["unexpected_keys"]) <= set(mtp)


def test_a_visual_encoder_that_the_text_class_lacks_is_said_to_be_left_out(work, tmp_path, capsys):
    """The folder names its tensors with another prefix; those of token prediction come along."""
    base = save_with_vision(tmp_path / "base")
    make_tokenizer().save_pretrained(base)
    mtp = add_mtp(base)
    trained(work, base, imported=OWN_MODEL)
    assert convert(work, tmp_path / "hf") == 0
    said = capsys.readouterr().out
    assert "copied from the base" in said and "model.visual." in said.partition("not written")[2]
    weights = Weights(tmp_path / "hf")
    assert all(torch.equal(weights.read(name), mtp[name]) for name in mtp)
    assert not any("visual" in name for name in weights.infos)


def test_experts_are_verified_by_their_weights(work, tmp_path, capsys, monkeypatch):
    """Rounding may change a router's choice: logits say nothing about what was written."""
    imported = "from tests.helpers.contract_model import ContractModel"
    own = "from xtuner.model import SupervisedFinetune as ContractModel"
    monkeypatch.setitem(globals(), "CONFIG", CONFIG.replace(imported, own))
    base = save_tiny(tmp_path / "base", "mixtral", num_local_experts=4, initializer_range=0.2)
    trained(work, base)
    assert convert(work, tmp_path / "hf", "--dtype", "bf16") == 0
    said = capsys.readouterr().out
    assert "each weight is the expected one, rounded to bfloat16" in said
    with monkeypatch.context() as patch:  # a large one is loaded again, and that alone
        patch.setattr(verify, "AUTO_VERIFY_BYTES", 0)
        assert convert(work, tmp_path / "large", "--dtype", "bf16") == 0
        assert "tensors were read again" in capsys.readouterr().out
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "large", dtype="auto")
        assert stock.dtype == torch.bfloat16
        read = TrainedWeights.read
        other: Any = lambda own, name: read(own, name) + ("down_proj" in name)  # noqa: E731
        patch.setattr(TrainedWeights, "read", other)
        assert convert(work, tmp_path / "wrong") == 1
        assert "layers.0.mlp.experts.down_proj" in capsys.readouterr().err
    trained(work, base, LORA.format(save=[]).replace('"down_proj"', '"v_proj"'))
    assert convert(work, tmp_path / "adapter", "--dtype", "bf16") == 0
    assert "each weight is the expected one, rounded to bfloat16" in capsys.readouterr().out


def test_adapter(work, tiny_llama, tmp_path, capsys):
    model = trained(work, tiny_llama, LORA.format(save=["lm_head"]))
    out = tmp_path / "adapter"
    config = str(work / "config.py")
    words = ["convert", "pth_to_hf", config, str(work / "iter_1.pth"), str(out)]
    assert main(words) == 0
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tiny_llama)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, out)), logits(model.llm))
    assert json.loads((out / "xtuner_base.json").read_text())["fingerprint"]["values"]
    capsys.readouterr()
    merged = tmp_path / "merged"
    assert main(["convert", "merge", str(tiny_llama), str(out), str(merged)]) == 0
    assert "the one that the adapter was trained on" in capsys.readouterr().out
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(merged)),
        logits(model.llm),
        atol=2e-5,
        rtol=1e-4,
    )
    assert main(["check-template", str(merged), "--prompt-template", "qwen_chat"]) == 0


def test_tied_embeddings_are_written_once(work, tmp_path):
    base = save_tiny(tmp_path / "base", "qwen2", tie_word_embeddings=True)
    model = trained(work, base)
    assert convert(work, tmp_path / "hf") == 0
    assert "lm_head.weight" not in Weights(tmp_path / "hf").infos
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(logits(stock), logits(model.llm))


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [([], torch.bfloat16), (["--fp32"], torch.float32), (["--dtype", "fp16"], torch.float16)],
)
def test_dtype_is_as_trained_or_as_asked(flags, dtype, work, tiny_llama, tmp_path):
    trained(work, tiny_llama, dtype=torch.bfloat16)
    assert convert(work, tmp_path / "hf", *flags) == 0
    assert {info.dtype for info in Weights(tmp_path / "hf").infos.values()} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto").dtype == dtype


def test_a_folder_of_fsdp(work, tiny_llama, tmp_path):
    import torch.distributed.checkpoint as dcp

    model = trained(work, tiny_llama)
    (work / "iter_1.pth").unlink()
    dcp.save({"state_dict": model.state_dict()}, checkpoint_id=work / "iter_1.pth", no_dist=True)
    assert convert(work, tmp_path / "hf") == 0
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(logits(stock), logits(model.llm))


def test_bin_files(work, tiny_llama, tmp_path):
    model = trained(work, tiny_llama)
    assert convert(work, tmp_path / "hf", "--no-safe-serialization") == 0
    assert not list((tmp_path / "hf").glob("*.safetensors"))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(logits(stock), logits(model.llm))


def refused(status: int, capsys: Any, out: Path) -> str:
    said = capsys.readouterr().err
    assert status != 0 and "Traceback" not in said
    assert not out.exists()
    assert not [entry.name for entry in out.parent.iterdir() if entry.name.startswith(".")]
    return said


def test_keys_that_do_not_fit_are_named(work, tiny_llama, tmp_path, capsys):
    model = trained(work, tiny_llama)
    state = model.state_dict()
    del state["llm.lm_head.weight"]
    state["llm.extra.weight"] = torch.zeros(2)
    state["llm.model.norm.weight"] = torch.zeros(3)
    torch.save({"state_dict": state}, work / "iter_1.pth")
    out = tmp_path / "hf"
    said = refused(convert(work, out), capsys, out)
    assert "missing: llm.lm_head.weight" in said
    assert "unexpected: llm.extra.weight" in said
    assert "llm.model.norm.weight [3] != [64]" in said


def test_bad_input(work, tiny_llama, tmp_path, capsys, monkeypatch):
    trained(work, tiny_llama)
    out = tmp_path / "hf"
    pth = str(work / "iter_1.pth")
    words = ["convert", "pth_to_hf"]
    assert "no such checkpoint" in refused(main([*words, "no.pth", str(out)]), capsys, out)
    assert "expected 2 or 3 arguments" in refused(main([*words, pth]), capsys, out)
    piece = tmp_path / "iter_2.pth" / "mp_rank_00_model_states.pt"
    piece.parent.mkdir()
    piece.touch()
    assert "a part of the checkpoint" in refused(main([*words, str(piece), str(out)]), capsys, out)
    lone = tmp_path / "lone"
    lone.mkdir()
    shutil.copy(pth, lone / "iter_1.pth")
    assert "no config beside" in refused(convert(lone, out), capsys, out)
    (work / "iter_1.pth").write_bytes((work / "iter_1.pth").read_bytes()[:2000])
    assert "damaged" in refused(convert(work, out), capsys, out)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    trained(work, tiny_llama)
    assert "only 0.00 MB are free" in refused(convert(work, out), capsys, out)


def test_checkpoints_given_as_models_and_the_other_way_round(tmp_path, capsys):
    """One sentence, and the command that goes on from there."""
    run = tmp_path / "run"
    model = tmp_path / "model"
    for name in ("iter_4.pth/mp_rank_00_model_states.pt", "iter_12.pth", "config.py"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("model = dict()\n")
    (tmp_path / "global_step4").mkdir()
    shutil.copy(run / "iter_4.pth" / "mp_rank_00_model_states.pt", tmp_path / "global_step4")
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).write_text("{}")
    part, other = run / "iter_4.pth", tmp_path / "global_step4"
    convert, out = ["convert", "pth_to_hf"], str(tmp_path / "out")
    cases = [
        ([*convert, *part.iterdir()], "this is a part of", part),
        ([*convert, *other.iterdir()], "this is a part of", other),
        ([*convert, run], "has checkpoints; it is none", run / "iter_12.pth"),
        ([*convert, run / "config.py"], "no checkpoint of training", "[CONFIG] PTH OUT"),
        ([*convert, model / "model.safetensors"], "no checkpoint of training", "PTH OUT"),
        (["chat", run], "no config.json", run / "iter_12.pth"),
        (["chat", part], "no config.json", part),
        (["chat", run / "iter_12.pth"], "a file, not the folder", run / "iter_12.pth"),
        (["chat", *part.iterdir()], "a file, not the folder", part),
        (["chat", model / "model.safetensors"], "give the folder", model),
        (["convert", "merge", model, run / "iter_12.pth"], "a file, not", run / "iter_12.pth"),
        (["convert", "split", part], "no config.json", part),
    ]
    for words, wrong, wanted in cases:
        words = [str(word) for word in words] + [out] * (words[0] == "convert")
        assert main(words) == 1, words
        said = capsys.readouterr().err
        assert wrong in said and str(wanted) in said and len(said.splitlines()) == 2, said


def test_a_template_that_serving_cannot_follow_is_refused(work, tiny_llama, tmp_path, capsys):
    trained(work, tiny_llama, template="internlm_chat")  # its <eoa> is no token here
    out = tmp_path / "hf"
    said = refused(convert(work, out), capsys, out)
    assert "would not build the same prompt" in said and "--force" in said
    assert convert(work, out, "--force") == 0


def test_a_wrong_result_is_found_and_not_kept(work, tiny_llama, tmp_path, capsys, monkeypatch):
    from xtuner.export.trained_weights import TrainedWeights

    trained(work, tiny_llama)
    read = TrainedWeights.read

    def spoilt(self, name):
        return read(self, name) * (1.5 if "q_proj" in name else 1)

    monkeypatch.setattr(TrainedWeights, "read", spoilt)
    out = tmp_path / "hf"
    assert "q_proj.weight" in refused(convert(work, out), capsys, out)


def test_a_base_that_is_gone(work, tmp_path, capsys):
    base = tmp_path / "base"
    make_model().save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    trained(work, base)
    shutil.rmtree(base)
    out = tmp_path / "hf"
    assert str(base) in refused(convert(work, out), capsys, out)
