"""No command runs code of a model folder unless it is told to, and then it names the file."""

from __future__ import annotations

import ast
import io
import json
import re
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from xtuner import apis
from xtuner.entry_point import main
from xtuner.model.remote_code import _announce, has_code
from xtuner.utils.errors import UserError

PACKAGE = Path(apis.__file__).parents[1]
RAN = "raise SystemExit('the code ran')\n"
ROW = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
LLAMA = {"AutoConfig": "configuration_own.LlamaConfig"}
LLAMA |= {"AutoModelForCausalLM": "modeling_own.LlamaForCausalLM"}


def with_code(source, folder, *, model_type="own", auto_map=None, tokenizer="OwnTokenizer"):
    """A copy of a model folder whose code ends the process when it is imported."""
    shutil.copytree(source, folder)
    for kind in ("configuration", "modeling", "tokenization", "image_processing"):
        (folder / f"{kind}_own.py").write_text(RAN, "utf-8")
    names = ("Config", "ForCausalLM", "ForSequenceClassification", "Model")
    own = {f"Auto{'Model' if name != 'Config' else ''}{name}": f"modeling_own.Own{name}"
           for name in names}  # fmt: skip
    own["AutoModel"] = own.pop("AutoModelModel")
    own["AutoConfig"] = "configuration_own.OwnConfig"
    edit(folder / "config.json", model_type=model_type, auto_map=auto_map or own)
    tokenizer_map = {"AutoTokenizer": [f"tokenization_own.{tokenizer}", None]}
    edit(folder / "tokenizer_config.json", auto_map=tokenizer_map, tokenizer_class=tokenizer)
    return folder


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")


@pytest.fixture(scope="module")
def unknown(tiny_llama, tmp_path_factory):
    """Neither transformers nor we have a class for it."""
    return with_code(tiny_llama, tmp_path_factory.mktemp("models") / "unknown")


@pytest.fixture(scope="module")
def known(tiny_llama, tmp_path_factory):
    """Its code defines classes that transformers has."""
    folder = tmp_path_factory.mktemp("models") / "known"
    names = {"auto_map": LLAMA, "tokenizer": "PreTrainedTokenizerFast"}
    return with_code(tiny_llama, folder, model_type="llama", **names)


@pytest.fixture(scope="module")
def adapter(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
    return folder


@pytest.fixture
def words(tmp_path, adapter, monkeypatch):
    """For each command what to type for a model folder."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\ny\n"))  # what transformers would ask for
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    (data / "a.jsonl").write_text(json.dumps(ROW) + "\n", "utf-8")
    (data / "a.json").write_text(json.dumps([{"messages": ROW}]), "utf-8")
    ftdp = ["--processed-dir", data, "--tokenized-dir", out, "--tokenizer-path"]
    folder = ["--data-folder", data, "--save-folder", out, "--dataset-format", "openai"]
    folder += ["--prompt-template", "internlm2_chat", "--max-length", "64", "--file-type", ".json"]

    def stranger(base):
        copy = tmp_path / "stranger"
        shutil.copytree(adapter, copy)
        edit(copy / "adapter_config.json", base_model_name_or_path=str(base))
        return copy

    def question(template):
        return ["--prompt-template", template, "--max-new-tokens", "2"]

    return {
        "chat": lambda model: ["chat", model, *question("internlm2_chat")],
        "chat adapter": lambda model: ["chat", stranger(model), *question("internlm2_chat")],
        "merge": lambda model: ["convert", "merge", model, adapter, out, "--device", "cpu"],
        "check-template": lambda model: [
            *("check-template", model, "--prompt-template", "internlm2_chat")
        ],
        "preprocess ftdp": lambda model: ["preprocess", "ftdp", *ftdp, model],
        "preprocess folder": lambda model: [
            *("preprocess", "folder", *folder, "--tokenizer-path", model)
        ],
    }


COMMANDS = [
    "chat",
    "chat adapter",
    "merge",
    "check-template",
    "preprocess ftdp",
    "preprocess folder",
]


def run(command):
    return main([str(word) for word in command])


@pytest.mark.parametrize("name", COMMANDS)
def test_code_of_unknown_classes_is_refused(name, words, unknown, capsys):
    assert run(words[name](unknown)) == 1
    shown = capsys.readouterr().err
    assert "only code that comes with the model knows its class" in shown
    assert f"{unknown}/" in shown and "add --trust-remote-code" in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_code_that_is_trusted_is_run_and_named(name, words, unknown, capsys):
    _announce.cache_clear()
    with pytest.raises(SystemExit, match="the code ran"):
        run([*words[name](unknown), "--trust-remote-code"])
    assert f"code of the model folder is run: {unknown}/" in capsys.readouterr().err


def test_a_tokenizers_configuration_is_named_before_it_runs(unknown, capsys):
    _announce.cache_clear()
    with pytest.raises(SystemExit, match="the code ran"):
        run(["check-template", str(unknown), "--trust-remote-code"])
    shown = capsys.readouterr().err
    assert f"{unknown}/configuration_own.py" in shown and f"{unknown}/tokenization_own.py" in shown


@pytest.mark.parametrize("flag", [[], ["--trust-remote-code"]], ids=["plain", "trusted"])
@pytest.mark.parametrize("name", COMMANDS)
def test_known_classes_are_preferred(name, flag, words, known, capsys):
    # a template that does not fit this tokenizer is what check-template is there to report
    assert run([*words[name](known), *flag]) == 0 or name == "check-template"
    assert "code of the model folder" not in capsys.readouterr().err


def test_copy_cfg_runs_no_code(unknown, known, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))  # what transformers would ask for
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": ROW}) + "\n", "utf-8")
    words = ["--method", "lora", "--data", tmp_path / "a.jsonl", tmp_path / "my.py"]
    assert run(["copy-cfg", "--model", unknown, *words]) == 1
    shown = capsys.readouterr().err
    assert "only code that comes with the model knows its class" in shown
    assert "set trust_remote_code=True in it" in shown
    assert run(["copy-cfg", "--model", known, *words]) == 0
    assert "trust_remote_code=True" not in (tmp_path / "my.py").read_text("utf-8")


def test_auto_classes_are_told_whether_code_may_run():
    """Otherwise transformers asks, and takes the next line of standard input as the answer."""
    untold = [
        f"{file}:{node.lineno}"
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Call)
        and re.match(r"_?auto\w*(\(.*\))?\.from_pretrained", ast.unparse(node.func), re.I)
        and not {"trust_remote_code", None} & {keyword.arg for keyword in node.keywords}
    ]
    assert not untold


def test_split_copies_code_and_does_not_run_it(unknown, tmp_path):
    assert main(["convert", "split", str(unknown), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "modeling_own.py").read_text("utf-8") == RAN


@pytest.mark.parametrize("kind", ["model", "lora_model"])
def test_the_python_interface(kind, unknown, known):
    build = getattr(apis, f"build_{kind}")
    with pytest.raises(UserError, match="only code that comes with the model") as refused:
        build(str(unknown))
    assert "trust_remote_code=True" in refused.value.hint
    with pytest.raises(SystemExit, match="the code ran"):
        build(str(unknown), trust_remote_code=True)
    model, _ = build(str(known), trust_remote_code=True)
    assert isinstance(model, torch.nn.Module)


@pytest.mark.parametrize("command", ["mmbench", "eval_refcoco"])
def test_evaluations(command, unknown, tmp_path, monkeypatch, capsys):
    from xtuner.tools import vlm_evaluation
    from xtuner.tools.vlm_evaluation import add_shared_arguments

    (tmp_path / "llava" / "projector").mkdir(parents=True)
    words = [unknown, "--data-path", "x", "--llava", tmp_path / "llava"]
    words += ["--prompt-template", "vicuna"]
    import argparse

    parser = argparse.ArgumentParser()
    add_shared_arguments(parser)
    with pytest.raises(UserError, match="only code that comes with the model"):
        vlm_evaluation.load_session(parser.parse_args([str(word) for word in words]))
    with pytest.raises(SystemExit, match="the code ran"):
        args = [*map(str, words), "--trust-remote-code"]
        vlm_evaluation.load_session(parser.parse_args(args))


def test_a_visual_encoder_and_its_processor(unknown, tmp_path):
    from transformers import AutoImageProcessor

    from xtuner.chat.vision_language import _visual_encoder
    from xtuner.model.remote_code import load_pretrained

    with pytest.raises(UserError, match="only code that comes with the model"):
        _visual_encoder(str(unknown), torch.float32, False)
    own = {"AutoImageProcessor": "image_processing_own.OwnImageProcessor"}
    (unknown / "preprocessor_config.json").write_text(json.dumps({"auto_map": own}), "utf-8")
    with pytest.raises(UserError, match="OwnImageProcessor"):
        load_pretrained(AutoImageProcessor, unknown, trusted=False)


def test_a_tokenizer_of_a_config(unknown):
    from transformers import AutoTokenizer

    from xtuner.registry import BUILDER

    settings = {"type": AutoTokenizer.from_pretrained}
    settings["pretrained_model_name_or_path"] = str(unknown)
    with pytest.raises(UserError, match=r"tokenization_own\.OwnTokenizer") as refused:
        BUILDER.build(dict(settings))
    assert "add trust_remote_code=True" in refused.value.hint
    with pytest.raises(SystemExit, match="the code ran"):
        BUILDER.build({**settings, "trust_remote_code": True})


def test_lagent_trusts_every_folder_so_it_is_refused(unknown, tiny_llama, monkeypatch, capsys):
    assert has_code(str(unknown)) and not has_code(str(tiny_llama))
    monkeypatch.setenv("SERPER_API_KEY", "key")
    for name in ("lagent", "lagent.actions", "lagent.agents", "lagent.llms"):
        module = types.ModuleType(name)
        module.__getattr__ = lambda name: pytest.fail(f"{name} is used")
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("xtuner.chat.lagent.require", lambda *args, **kwargs: None)
    assert main(["chat", str(unknown), "--lagent"]) == 1
    assert "--trust-remote-code" in capsys.readouterr().err
