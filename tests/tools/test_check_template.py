"""All 26 templates on three tokenizers: training, the Jinja template and chat agree."""

from __future__ import annotations

import json

import pytest

from tests.helpers.tiny import make_tokenizer
from xtuner.entry_point import main
from xtuner.export.trained_template import set_chat_template
from xtuner.tokenization.chat_template import render_question, to_jinja
from xtuner.tools.check_template import PROBES, compare, read_conversations
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
    assert not problems or (name == "deepseek_v2" and kind != "metaspace")


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
    assert main(["check-template", str(tmp_path / "good")]) == 1
    assert "--prompt-template" in capsys.readouterr().err


def test_rows_that_cannot_be_read(tmp_path):
    file = tmp_path / "rows.jsonl"
    for content, where in ("{", "rows.jsonl"), ('{"messages": []}\n', "rows.jsonl:1"):
        file.write_text(content)
        with pytest.raises(UserError) as caught:
            read_conversations(file)
        assert where in str(caught.value)
