"""All 26 templates on three tokenizers: training, the Jinja template and chat agree."""

from __future__ import annotations

import json

import pytest

from tests.helpers.tiny import make_tokenizer
from tests.tokenization.test_messages import SWITCHED, TALK, TOOLS
from xtuner.entry_point import main
from xtuner.export.trained_template import set_chat_template, template_of
from xtuner.proving.templates import PROBES, compare
from xtuner.tokenization.chat_template import render_question, to_jinja
from xtuner.tokenization.template_check import PROBES as OWN_PROBES
from xtuner.tools.check_template import read_conversations
from xtuner.utils.errors import UserError
from xtuner.utils.templates import PROMPT_TEMPLATE

NAMES = sorted(name for name in PROMPT_TEMPLATE if name != "auto")


@pytest.fixture(scope="module")
def tokenizers():
    made = {}
    for kind in "byte_level", "metaspace", "bos_eos":
        tokenizer = make_tokenizer(kind, chat_template=None)
        suffixes = {PROMPT_TEMPLATE[name].get("SUFFIX", "").strip() for name in NAMES} - {""}
        tokenizer.add_special_tokens({"extra_special_tokens": sorted(suffixes)})
        made[kind] = tokenizer
    return made


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "bos_eos"])
@pytest.mark.parametrize("name", NAMES)
def test_all_agree(name, kind, tokenizers):
    tokenizer = tokenizers[kind]
    set_chat_template(tokenizer, PROMPT_TEMPLATE[name])
    problems = compare(tokenizer, PROMPT_TEMPLATE[name])
    assert not [str(problem) for problem in problems if not problem.harmless]
    # Its prompt ends with a space, which joined text gives to the answer's first word.
    assert not problems or name == "deepseek_v2"


def tried(tokenizer, name, change):
    set_chat_template(tokenizer, PROMPT_TEMPLATE[name])
    tokenizer.chat_template = change(tokenizer.chat_template)
    return compare(tokenizer, PROMPT_TEMPLATE[name])


def test_differences_are_found(tokenizers):
    tokenizer = tokenizers["byte_level"]
    assert not tried(tokenizer, "internlm2_chat", lambda text: text)
    no_break = tried(tokenizer, "internlm2_chat", lambda text: text.replace("user\\n", "user", 1))
    assert no_break and not no_break[0].harmless
    no_bos = tried(tokenizer, "default", lambda text: text.replace("{{- bos_token -}}", ""))
    assert "<s>" in no_bos[0].expected and "<s>" not in no_bos[0].found
    no_system = tried(
        tokenizer,
        "vicuna",
        lambda text: text.replace("{%- if state.system -%}", "{%- if false -%}"),
    )
    assert no_system


def test_an_answer_must_end_where_generation_stops(tokenizers):
    tokenizer = make_tokenizer(chat_template=None)  # does not know <eoa>
    set_chat_template(tokenizer, PROMPT_TEMPLATE.internlm_chat)
    problems = compare(tokenizer, PROMPT_TEMPLATE.internlm_chat)
    assert "generation does not stop" in str(problems[-1])
    set_chat_template(tokenizer, PROMPT_TEMPLATE.qwen_chat)
    assert not compare(tokenizer, PROMPT_TEMPLATE.qwen_chat)
    assert compare(tokenizer, PROMPT_TEMPLATE.qwen_chat, saved_stop_ids=[1])


def test_rounds_and_braces():
    template = PROMPT_TEMPLATE.chatglm2
    text = render_question(template, "{round} {input} {x", 3, "{input}")
    assert text == "{input}\n[Round 3]\n\n问：{round} {input} {x\n\n答："
    assert "state.round" in to_jinja(template, with_bos=False)


def save(tokenizer, folder, stops):
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text("{}")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))


def test_the_command(tokenizers, tmp_path, capsys):
    tokenizer = tokenizers["byte_level"]
    set_chat_template(tokenizer, PROMPT_TEMPLATE.qwen_chat)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    save(tokenizer, tmp_path / "good", [stop])
    data = tmp_path / "rows.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
        {"conversation": [{"system": "s", "input": "a", "output": "b"}]},
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    words = ["check-template", str(tmp_path / "good"), "--prompt-template", "qwen_chat"]
    assert main([*words, "--data", str(data)]) == 0
    assert f"{len(PROBES) + 2} conversations" in capsys.readouterr().out
    save(tokenizer, tmp_path / "bad", [stop + 1])
    words = ["check-template", str(tmp_path / "bad"), "--prompt-template", "qwen_chat"]
    assert main(words) == 1
    assert "'<|im_end|>'" in capsys.readouterr().err
    assert main(["check-template", str(tmp_path / "good")]) == 0  # known by its text
    assert "named template has no tools" in capsys.readouterr().out
    assert main(["check-template", "no-such-owner/no-such-model"]) == 1  # a name of the hub
    assert "no-such-owner/no-such-model" in (said := capsys.readouterr().err)
    assert "no such config file" not in said
    (tmp_path / "good" / "chat_template.jinja").unlink()
    assert main(["check-template", str(tmp_path / "good")]) == 1
    assert "--prompt-template" in capsys.readouterr().err


def test_the_tokenizers_own_template(tmp_path, capsys):
    tokenizer = make_tokenizer(chat_template=SWITCHED)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    save(tokenizer, tmp_path / "model", [1])
    data = tmp_path / "rows.jsonl"
    row = {"messages": TALK, "tools": json.dumps(TOOLS)}
    data.write_text(json.dumps(row) + "\n")
    words = ["check-template", str(tmp_path / "model")]
    assert main([*words, "--data", str(data)]) == 0
    out = capsys.readouterr().out
    assert "enable_thinking, a system prompt, tools, a tool call" in out
    assert f"{3 * (len(OWN_PROBES) + 1)} conversations" in out
    save(make_tokenizer(), tmp_path / "plain", [stop])
    assert main(["check-template", str(tmp_path / "plain"), "--prompt-template", "auto"]) == 0
    assert "not supported by this chat template: tools" in capsys.readouterr().out
    data.write_text(json.dumps({"messages": TALK[1:]}) + "\n")
    assert main([*words, "--data", str(data)]) == 1
    assert "rows.jsonl:1" in capsys.readouterr().err
    # what a folder of convert says is what servers stop at
    (tmp_path / "model" / "xtuner_config.py").write_text("prompt_template = PROMPT_TEMPLATE.auto")
    assert main(words) == 1
    assert capsys.readouterr().err.count("generation does not stop") == 1


def test_a_config_with_the_tokenizers_own_template(tmp_path, capsys):
    from xtuner.config import load_config
    from xtuner.tools.check_template import _training

    tokenizer = make_tokenizer(chat_template=SWITCHED)
    save(tokenizer, tmp_path / "model", [1])
    config = tmp_path / "own.py"
    config.write_text(
        "from transformers import AutoTokenizer\n"
        "from xtuner.dataset.map_fns import template_map_fn_factory\n"
        "from xtuner.utils import PROMPT_TEMPLATE\n"
        f"tokenizer = dict(type=AutoTokenizer.from_pretrained, "
        f"pretrained_model_name_or_path={str(tmp_path / 'model')!r})\n"
        "own = dict(type=template_map_fn_factory, template=PROMPT_TEMPLATE.auto, "
        "template_arguments=dict(enable_thinking=False))\n"
        "train_dataloader = dict(dataset=dict(template_map_fn=own, train_thinking='drop'))\n"
    )
    training = _training(str(config), None, False)
    assert (training.template, training.thinking) == (None, "drop")
    assert training.arguments == {"enable_thinking": False}
    assert main(["check-template", str(config)]) == 0
    capsys.readouterr()
    assert _training(str(config), "qwen_chat", False).template == PROMPT_TEMPLATE.qwen_chat
    cfg = load_config(str(config))
    named = {**cfg.own, "template": PROMPT_TEMPLATE.qwen_chat, "template_arguments": None}
    cfg.train_dataset = {"template_map_fn": named}
    with pytest.raises(UserError, match="2 different prompt templates"):
        template_of(cfg)


def test_rows_that_cannot_be_read(tmp_path):
    file = tmp_path / "rows.jsonl"
    for content, where in ("{", "rows.jsonl"), ('{"messages": []}\n', "rows.jsonl:1"):
        file.write_text(content)
        with pytest.raises(UserError) as caught:
            read_conversations(file)
        assert where in str(caught.value)
