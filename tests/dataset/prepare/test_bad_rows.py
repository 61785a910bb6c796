"""Rows that cannot be used are named by file and line; tools and reasoning are not lost unseen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import load_dataset

from tests.helpers.tiny import make_tokenizer
from xtuner.dataset.huggingface import process_hf_dataset
from xtuner.dataset.map_fns import (
    alpaca_map_fn,
    auto_map_fn,
    openai_map_fn,
    template_map_fn_factory,
)
from xtuner.dataset.prepare.token_stats import token_stats_of
from xtuner.doctor.examine import examine
from xtuner.utils.constants import IGNORE_INDEX
from xtuner.utils.errors import UserError
from xtuner.utils.templates import PROMPT_TEMPLATE

STRICT = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (
    "{% if tools %}{{ tools }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and enable_thinking is not defined "
    "and '<think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
AUTO = template_map_fn_factory(PROMPT_TEMPLATE.auto)
NAMED = template_map_fn_factory(PROMPT_TEMPLATE.qwen_chat)
Q, A = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "Hello."}
S = {"role": "system", "content": "Be brief."}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XTUNER_CACHE", str(tmp_path / "cache"))


def write(name: str, *rows: object) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepared(files, template=STRICT, **settings):
    settings = {"dataset_map_fn": openai_map_fn, "template_map_fn": AUTO, **settings}
    return process_hf_dataset(
        dict(type=load_dataset, path="json", data_files=files),
        tokenizer=make_tokenizer(chat_template=template),
        max_length=64,
        pack_to_max_length=False,
        remove_unused_columns=True,
        **settings,
    )


REFUSED = {
    "an assistant turn first": [A, Q, A],
    "two assistant turns in a row": [Q, A, A],
    "two user turns in a row": [Q, Q, A],
    "a system turn": [S, Q, A],
    "an image": [{"role": "user", "content": [{"type": "image_url"}]}, A],
}


@pytest.mark.parametrize("messages", REFUSED.values(), ids=REFUSED)
def test_one_bad_row_among_good_ones(messages):
    write("a.jsonl", {"messages": [Q, A]}, {"messages": [Q, A, Q, A]})
    write("b.jsonl", {"messages": [Q, A]}, {"messages": messages}, {"messages": [Q, A]})
    with pytest.raises(UserError) as caught:
        prepared(["a.jsonl", "b.jsonl"])
    assert caught.value.message.startswith("b.jsonl:2: ")
    assert "bad_rows='drop'" in caught.value.hint
    made = prepared(["a.jsonl", "b.jsonl"], bad_rows="drop")
    stats = token_stats_of(made)
    assert [number for (number,) in made["rows"]] == [0, 1, 2, 4]
    assert stats.dropped["bad"] == [3]
    assert stats.bad_rows[0].startswith("b.jsonl:2: ")
    assert any("b.jsonl:2" in line for line in stats.losses())


def test_several_bad_rows_are_named_together():
    write("a.jsonl", *[{"messages": [Q, A]}] * 3, *[{"messages": [A, Q]}] * 9)
    with pytest.raises(UserError) as caught:
        prepared("a.jsonl")
    lines = caught.value.message.splitlines()
    assert [line.partition(": ")[0] for line in lines[1:]] == [
        f"a.jsonl:{number}" for number in range(4, 9)
    ]


def test_without_any_good_row_the_reason_is_said():
    write("a.jsonl", {"messages": [S, Q, A]})
    with pytest.raises(UserError, match=r"(?s)no row is left.*a\.jsonl:1: .*not supported"):
        prepared("a.jsonl", bad_rows="drop")


def test_rows_of_another_layout_are_left_out_or_named():
    write("a.jsonl", {"instruction": "a", "input": "", "output": "b"}, {"instruction": "c"})
    named = dict(dataset_map_fn=alpaca_map_fn, template_map_fn=NAMED)
    with pytest.raises(UserError, match=r"a\.jsonl:2: a?"):
        prepared("a.jsonl", **named, do_dataset_tokenization=False)
    made = prepared("a.jsonl", **named, do_dataset_tokenization=False, bad_rows="drop")
    assert len(made) == 1


def test_turns_that_are_none_are_bad_rows():
    write("a.jsonl", {"conversation": [{"input": "a", "output": "b"}]}, {"conversation": ["b"]})
    rows = [json.loads(line) for line in Path("a.jsonl").read_text().splitlines()]
    from datasets import Dataset

    with pytest.raises(UserError, match="a turn is not"):
        process_hf_dataset(
            Dataset.from_list([{"row": json.dumps(row)} for row in rows]),
            tokenizer=make_tokenizer(),
            max_length=64,
            dataset_map_fn=lambda row: json.loads(row["row"]),
        )


TOOLS = json.dumps([{"type": "function", "function": {"name": "add"}}])
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]}
RESULT = {"role": "tool", "content": "3"}
SHARE = [("human", "1+2?"), ("function_call", '{"name": "add", "arguments": {}}')]
SHARE += [("observation", "3"), ("gpt", "3.")]
SHAREGPT = {"conversations": [{"from": who, "value": text} for who, text in SHARE]}


@pytest.mark.parametrize(
    ("row", "map_fn", "missing"),
    [
        ({"messages": [Q, A], "tools": TOOLS}, openai_map_fn, "tools"),
        ({"messages": [Q, CALL, RESULT, A]}, openai_map_fn, "tool_calls"),
        ({"messages": [Q, CALL, RESULT, A], "tools": TOOLS}, auto_map_fn, "tools, tool_calls"),
        (SHAREGPT, auto_map_fn, "tool_calls"),
    ],
)
def test_tools_need_a_template_that_has_them(row, map_fn, missing):
    write("a.jsonl", {**row, "n": 1}, {**row, "n": 2})
    with pytest.raises(UserError) as caught:
        prepared("a.jsonl", THINKING, dataset_map_fn=map_fn, template_map_fn=NAMED)
    assert caught.value.message.startswith(f"a.jsonl:1 has {missing}, which the prompt template")
    assert "PROMPT_TEMPLATE.auto" in caught.value.hint
    for template_map_fn in (NAMED, AUTO):  # this tokenizer has none either
        with pytest.raises(UserError) as caught:
            prepared("a.jsonl", dataset_map_fn=map_fn, template_map_fn=template_map_fn)
        assert "none either" in caught.value.hint
    assert len(prepared("a.jsonl", THINKING, dataset_map_fn=map_fn)) == 2


def test_results_of_tools_need_a_template_that_has_them():
    write("a.jsonl", {"messages": [Q, A, RESULT, RESULT, A]})
    with pytest.raises(UserError, match=r"a\.jsonl:1 has tool, which the prompt template"):
        prepared("a.jsonl", THINKING, dataset_map_fn=openai_map_fn, template_map_fn=NAMED)


def test_the_users_own_map_function_may_put_tools_where_it_likes():
    def own(row):
        return {"conversation": [{"input": row["tools"], "output": "b"}]}

    write("a.jsonl", {"tools": TOOLS})
    assert len(prepared("a.jsonl", dataset_map_fn=own, template_map_fn=NAMED)) == 1


def texts(made, template=THINKING) -> list[tuple[str, str]]:
    """The text of each row, and what of it is trained."""
    decode = make_tokenizer(chat_template=template).decode
    return [
        (decode(row["input_ids"]), decode([t for t in row["labels"] if t != IGNORE_INDEX]))
        for row in made
    ]


EMPTY, FULL = "<think>\n\n</think>\n\n", "<think>\nhm\n</think>\n\n"


@pytest.mark.parametrize(
    ("mode", "trained", "trained_full"),
    [
        ("keep", f"{EMPTY}Hello.<|im_end|>", f"{FULL}Hello.<|im_end|>"),
        ("mask_empty", "Hello.<|im_end|>", f"{FULL}Hello.<|im_end|>"),
        ("drop", "Hello.<|im_end|>", "Hello.<|im_end|>"),
    ],
)
@pytest.mark.parametrize("template", ["auto", "named"])
def test_think_blocks(mode, trained, trained_full, template):
    """With a named template the block is in the data; the tokenizer's own inserts it."""
    given = "" if template == "auto" else EMPTY
    write(
        "a.jsonl",
        {"messages": [Q, {**A, "content": f"{given}Hello."}]},
        {"messages": [Q, {**A, "content": f"{FULL}Hello."}]},
    )
    template_map_fn = AUTO if template == "auto" else NAMED
    made = prepared("a.jsonl", THINKING, template_map_fn=template_map_fn, train_thinking=mode)
    (text, labels), (_, full_labels) = texts(made)
    assert EMPTY in text
    assert (labels, full_labels) == (trained, trained_full)


def test_template_arguments_reach_the_template():
    write("a.jsonl", {"messages": [Q, A]})
    quiet = template_map_fn_factory(PROMPT_TEMPLATE.auto, dict(enable_thinking=False))
    ((text, trained),) = texts(prepared("a.jsonl", THINKING, template_map_fn=quiet))
    assert "<think>" not in text
    assert trained == "Hello.<|im_end|>"
    with pytest.raises(UserError, match="takes no template_arguments"):
        template_map_fn_factory(PROMPT_TEMPLATE.qwen_chat, dict(enable_thinking=False))


def test_unknown_policies_are_refused():
    write("a.jsonl", {"messages": [Q, A]})
    with pytest.raises(UserError, match=r"bad_rows: expected .* got 'skip'"):
        prepared("a.jsonl", bad_rows="skip")
    with pytest.raises(UserError, match=r"train_thinking: expected .* got 'no'"):
        prepared("a.jsonl", train_thinking="no")


@pytest.mark.parametrize("varlen", [False, True])
def test_lines_that_are_no_json_are_left_out_counted_and_named(tmp_path, monkeypatch, varlen):
    monkeypatch.setenv("XTUNER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    file = tmp_path / "a.jsonl"
    ok = [{"conversation": [{"input": "q", "output": word}]} for word in ("one", "two", "three")]
    lines = [json.dumps(row) for row in ok]
    broken = ["null", lines[0], '{"conversation": [', lines[1], "[1]", '{"conversation": 5}']
    file.write_text("\n".join([*broken, lines[2]]) + "\n", "utf-8")
    settings = dict(
        dataset=dict(type=load_dataset, path="json", data_files=dict(train=str(file))),
        tokenizer=make_tokenizer(),
        max_length=64,
        pack_to_max_length=varlen,
        use_varlen_attn=varlen,
    )
    with pytest.raises(UserError, match=r"a\.jsonl:1: .*not an object"):
        process_hf_dataset(**settings)
    made = process_hf_dataset(**settings, bad_rows="drop")
    stats = token_stats_of(made)
    assert stats.rows_in == 7 and stats.rows_trained == 3
    assert stats.dropped["unreadable"] == [1, 3, 5] and len(stats.dropped["bad"]) == 1
    named = "\n".join(stats.losses())
    for line in (1, 3, 5, 6):
        assert f"a.jsonl:{line}: " in named
    assert sorted(number for numbers in made["rows"] for number in numbers) == [0, 1, 3]

    report, _ = examine("c.py", {"type": process_hf_dataset, **settings, "bad_rows": "drop"})
    found = {one.code: [place.line for place in one.places] for one in report.scan.findings}
    assert found == {"left-out": [1, 3, 5, 6]} and not report.scan.findings.has_errors

    file.write_text("\n".join([*broken[:5], lines[2]]) + "\n", "utf-8")
    report, shown = examine("c.py", {"type": process_hf_dataset, **settings, "bad_rows": "drop"})
    assert not report.scan.findings.has_errors and len(report.tokens.lengths) == 3
    assert shown.rows[0].source.endswith("a.jsonl:2")


def test_a_file_without_a_row_that_can_be_read_is_refused(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("null\n[1]\n", "utf-8")
    source = dict(type=load_dataset, path="json", data_files=str(file))
    with pytest.raises(UserError, match=r"a\.jsonl:1: .*not an object"):
        process_hf_dataset(source, tokenizer=make_tokenizer(), max_length=8, bad_rows="drop")
