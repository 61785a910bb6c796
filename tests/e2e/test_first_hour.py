"""Small things of the first hour: what is asked for in other words is found or answered."""

from __future__ import annotations

import pytest

from tests.e2e.test_own_code import say
from tests.helpers.tiny import make_tokenizer
from xtuner.config import load_config
from xtuner.config.check.checker import check
from xtuner.entry_point import main
from xtuner.export.trained_template import set_chat_template, trained_templates
from xtuner.tools.chat import _warn_of_another_template
from xtuner.utils.errors import UserError, require
from xtuner.utils.templates import PROMPT_TEMPLATE


@pytest.mark.parametrize("words", [["qwen3"], ["-p", "internlm2.5"], ["InternLM2.5-7B"]])
def test_names_are_found_as_people_write_them(capsys, words):
    lines = say(capsys, "list-cfg", *words).splitlines()
    assert any(line.startswith(("qwen3_", "internlm2_5_")) for line in lines)


def test_models_at_a_glance(capsys):
    said = say(capsys, "list-cfg", "--models", "qwen3")
    assert said.startswith("qwen\n") and "8b" in said and "qlora" in said
    assert "copy-cfg --model" in said and len(said.splitlines()) < 50
    assert len(say(capsys, "list-cfg", "--models").splitlines()) < 400
    assert main(["list-cfg", "--models", "nothing_like_this"]) == 1


@pytest.mark.parametrize("pattern", ["sharegpt", "messages", "instruction"])
def test_layouts_are_found_by_shape_and_field(capsys, pattern):
    lines = say(capsys, "list-dataset-format", "-p", pattern).splitlines()
    assert len([line for line in lines if not line.startswith(("=", "-"))]) >= 1


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--work_dir", "out"], "did you mean '--work-dir'?"),
        (["--lr", "1e-5"], "--cfg-options lr=1e-5"),
        (["--learning-rate", "1e-5"], "--cfg-options lr=1e-5"),
        (["--epochs"], "--cfg-options max_epochs=VALUE"),
        (["--output_dir", "out"], "did you mean '--work-dir'?"),
        (["--config", "c.py"], "xtuner train my.py"),
        (["--lr=1e-5"], "--cfg-options lr=1e-5"),
    ],
)
def test_other_spellings_are_answered(capsys, words, answer):
    status = main(["train", "no_such_config.py", *words])
    said = capsys.readouterr().err
    assert status == 2
    assert answer in said


def test_a_setting_that_an_option_replaces_is_not_called_unused():
    name = "internlm2_chat_1_8b_qlora_oasst1_e3"
    options = ["train_dataloader.batch_size=4", "optim_wrapper.optimizer.lr=1e-5"]
    assert [problem for problem in check(name, options) if problem.code == "XT0202"] == []


def test_a_model_or_rows_in_place_of_a_config(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "my.jsonl").write_text("{}\n")
    for given in (tmp_path, tmp_path / "my.jsonl"):
        assert main(["train", str(given)]) == 1
        assert "xtuner copy-cfg --model FOLDER_OR_HUB_ID --data FILE DIR" in capsys.readouterr().err


def test_the_home_folder_in_a_config(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = tmp_path / "own.py"
    config.write_text("path = '~/a model'\nfiles = ['~/a.jsonl']\ntexts = ['in ~/', '~/\\nb']\n")
    for loaded in (load_config(config), load_config(config, ["path=~/b"])):
        assert loaded.files == [f"{tmp_path}/a.jsonl"]
        assert loaded.texts == ["in ~/", "~/\nb"]
    assert loaded.path == f"{tmp_path}/b"
    (tmp_path / "own.yaml").write_text("path: ~/a\n")
    assert load_config(tmp_path / "own.yaml").path == f"{tmp_path}/a"


def test_missing_packages_are_named_as_pip_knows_them():
    with pytest.raises(UserError) as error:
        require("no_such_package_here", extra="quant", purpose="QLoRA")
    assert error.value.hint == "pip install no_such_package_here"


def test_chat_with_another_template_than_trained_says_so(capsys):
    tokenizer = make_tokenizer()
    assert trained_templates(tokenizer) == []
    _warn_of_another_template(tokenizer, "vicuna")
    assert capsys.readouterr().err == ""
    set_chat_template(tokenizer, PROMPT_TEMPLATE.internlm2_chat)
    assert trained_templates(tokenizer) == ["internlm2_chat", "qwen_chat"]  # they are the same
    _warn_of_another_template(tokenizer, "internlm2_chat")
    assert capsys.readouterr().err == ""
    _warn_of_another_template(tokenizer, "vicuna")
    assert "trained with the template internlm2_chat, not with vicuna" in capsys.readouterr().err
