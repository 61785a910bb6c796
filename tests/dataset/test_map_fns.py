"""Rows of each published format and the turns they become; templates around the turns."""

import json

import pytest

from xtuner.dataset.map_fns import (
    DATASET_FORMAT_MAPPING,
    auto_map_fn,
    template_map_fn_factory,
)
from xtuner.doctor.layouts import AUTO
from xtuner.utils import PROMPT_TEMPLATE, SYSTEM_TEMPLATE

TALK = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
S = SYSTEM_TEMPLATE
CASES = {
    "alpaca": (
        {"instruction": "do", "input": "x", "output": "y"},
        [{"input": "do\nx", "output": "y"}],
    ),
    "alpaca_zh": (
        {"instruction_zh": "做", "input_zh": "甲", "output_zh": "乙"},
        [{"input": "做\n甲", "output": "乙"}],
    ),
    "arxiv": (
        {"abstract": "A", "title": "T"},
        [{"system": S.arxiv_gentile, "input": "A", "output": "T"}],
    ),
    "code_alpaca": (
        {"prompt": "p", "completion": "c"},
        [{"system": S.coder, "input": "p", "output": "c"}],
    ),
    "colors": (
        {"description": "Blue: like {the} sea", "color": "#00f"},
        [{"system": S.colorist, "input": "like {the} sea", "output": "#00f"}],
    ),
    "crime_kg_assitan": (
        {"input": "q", "output": "a"},
        [{"system": S.lawyer, "input": "q", "output": "a"}],
    ),
    "default": ({"input": "q", "output": "a"}, [{"input": "q", "output": "a"}]),
    "law_reference": (
        {"question": "q", "answer": "a"},
        [{"system": S.lawyer, "input": "q", "output": "a"}],
    ),
    "llava": (
        {
            "conversations": [
                {"from": "human", "value": "look\n<image>"},
                {"from": "gpt", "value": "a"},
            ]
        },
        [{"input": "<image>\nlook", "output": "a"}],
    ),
    "llava_image_only": ({"conversations": TALK}, [{"input": "<image>", "output": "a"}]),
    "medical": (
        {"instruction": "i", "input": "", "output": "o"},
        [{"system": S.medical, "input": "i\n", "output": "o"}],
    ),
    "oasst1": (
        {"text": "### Human: hi### Assistant: hello### Human: bye"},
        [{"input": "hi", "output": "hello"}],
    ),
    "openai": (
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a", "loss": "False"},
                {"role": "user", "content": "q2"},
                {"role": "assistant", "content": "a2"},
            ]
        },
        [
            {"system": "s", "input": "q", "output": "a", "output_with_loss": False},
            {"input": "q2", "output": "a2", "output_with_loss": True},
        ],
    ),
    "openorca": (
        {"system_prompt": "s", "question": "q", "response": "r"},
        [{"system": "s", "input": "q", "output": "r"}],
    ),
    "pretrain": (
        {"text": " all of it \n"},
        [{"input": "", "output": "all of it", "need_eos_token": False}],
    ),
    "sql": (
        {"context": "c", "question": "q", "answer": "a"},
        [{"system": S.sql, "input": "c\nq", "output": "a"}],
    ),
    "stack_exchange": ({"question": "q", "response": "r"}, [{"input": "q", "output": "r"}]),
    "tiny_codes": (
        {"prompt": "p", "response": "r"},
        [{"system": S.coder, "input": "p", "output": "r"}],
    ),
    "wizardlm": ({"conversations": TALK}, [{"input": "q", "output": "a"}]),
}


def test_every_format_but_the_agents_is_in_the_table():
    assert set(DATASET_FORMAT_MAPPING) - set(CASES) == {"msagent_react"}


@pytest.mark.parametrize("name", CASES)
def test_rows_become_turns(name):
    row, turns = CASES[name]
    assert DATASET_FORMAT_MAPPING[name](row) == {"conversation": turns}


def test_a_row_without_an_answer_is_dropped():
    row = {"instruction": "i", "input": "", "output": "<nooutput>"}
    assert DATASET_FORMAT_MAPPING["alpaca"](row) == {"conversation": []}


def test_a_leading_answer_is_left_out():
    row = {"conversations": [TALK[1], *TALK]}
    assert DATASET_FORMAT_MAPPING["wizardlm"](row)["conversation"] == [
        {"input": "q", "output": "a"}
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"conversation": [{"input": "q", "output": "a"}]},
        {"input": "q", "output": "a"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"conversations": TALK},
        {"conversations": [{"role": "User", "content": "q"}, {"role": "bot", "content": "a"}]},
        {"text": "### Human: q### Assistant: a"},
    ],
)
def test_auto_recognises_the_layout(row):
    (turn,) = auto_map_fn(row)["conversation"]
    assert (turn["input"], turn["output"]) == ("q", "a")


def test_auto_names_the_fields_it_cannot_read():
    with pytest.raises(ValueError, match="foo, bar"):
        auto_map_fn({"foo": 1, "bar": 2})


def test_the_template_stands_around_each_turn():
    add = template_map_fn_factory(PROMPT_TEMPLATE.internlm2_chat)
    turns = [
        {"system": "be {kind}", "input": "q {x}", "output": "a"},
        {"input": "r", "output": "b"},
    ]
    first, second = add({"conversation": turns})["conversation"]
    assert first["input"] == (
        "<|im_start|>system\nbe {kind}<|im_end|>\n"
        "<|im_start|>user\nq {x}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert first["output"] == "a<|im_end|>"
    assert first["need_eos_token"] is False
    assert first["sep"] == "\n"
    assert "system" not in second["input"]


def test_rounds_count_from_one_and_eos_follows_where_the_suffix_is_none():
    add = template_map_fn_factory("xtuner.utils.PROMPT_TEMPLATE.chatglm2")
    turns = add({"conversation": [{"input": "q", "output": "a"}] * 2})["conversation"]
    assert [turn["input"][:9] for turn in turns] == ["[Round 1]", "[Round 2]"]
    assert all(turn["need_eos_token"] for turn in turns)


@pytest.mark.parametrize("role", AUTO.roles)
def test_every_role_that_the_doctor_knows_is_mapped(role):
    said = {"from": role, "value": "said"}
    (first, *_) = auto_map_fn({"conversations": [*TALK, said, *TALK]})["conversation"]
    assert first == {"input": "q", "output": "a", "output_with_loss": True}
    mapped = auto_map_fn({"conversations": [*TALK, said, *TALK]})["conversation"]
    assert "said" in "".join(str(turn) for turn in mapped)


CALL = {"name": "add", "arguments": {"a": 1}}


@pytest.mark.parametrize(("call", "result"), [("function_call", "observation"),
                                              ("tool_call", "tool_response")])  # fmt: skip
def test_auto_maps_calls_of_tools_and_a_column_with_the_system_text(call, result):
    row = {
        "system": "S",
        "conversations": [
            {"from": "human", "value": "1+1?"},
            {"from": call, "value": json.dumps(CALL)},
            {"from": result, "value": "2"},
            {"from": "gpt", "value": "It is 2."},
        ],
    }
    mapped = auto_map_fn(row)
    assert mapped["messages"] == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": CALL}]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
    ]
    first, second = mapped["conversation"]
    assert (first["system"], json.loads(first["output"])) == ("S", CALL)
    assert (second["input"], second["output"]) == ("2", "It is 2.")


def test_auto_maps_tool_roles_under_messages_and_joins_the_calls_of_one_answer():
    call, other = json.dumps(CALL), {"name": "now"}
    rows = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "Let me see.", "loss": False},
        {"role": "tool_call", "content": call},
        {"role": "tool_call", "content": json.dumps([other, CALL])},
        {"role": "tool_response", "content": "2", "name": "add"},
        {"role": "assistant", "content": "It is 2."},
    ]
    calls = [{"function": one} for one in (CALL, other, CALL)]
    assert auto_map_fn({"messages": rows})["messages"] == [
        rows[0],
        {**rows[1], "tool_calls": calls},
        {"role": "tool", "content": "2", "name": "add"},
        rows[5],
    ]
    assert "messages" not in auto_map_fn({"messages": [rows[0], rows[5]]})  # as they are


def test_auto_reads_history_and_system_beside_alpaca():
    row = {"instruction": "c", "input": None, "output": "C", "system": "S"}
    row["history"] = [["a", "A"], ["b", "B"]]
    turns = auto_map_fn(row)["conversation"]
    assert [(turn["input"], turn["output"]) for turn in turns] == [
        ("a", "A"),
        ("b", "B"),
        ("c\n", "C"),  # as published
    ]
    assert [turn.get("system") for turn in turns] == ["S", None, None]


def test_a_turn_without_a_question_keeps_the_templates_user_turn():
    """As published: an empty user turn, then the header of the answer."""
    add = template_map_fn_factory(PROMPT_TEMPLATE.qwen_chat)
    turns = [{"system": "S", "input": "", "output": "Hail."}, {"input": "Hi", "output": "Yes."}]
    first, second = add({"conversation": turns})["conversation"]
    assert first["input"] == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
    )
    assert second["input"] == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
