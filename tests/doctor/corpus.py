"""A corpus of data files: a hundred with one fault each, and as many good ones, made on the spot.

A faulty file is a row of ``FAULTS``: name, map function, lines of the file, the code that must be
found and the line of the fault. Good rows around it come from ``good_rows``.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from xtuner.doctor.layouts import BY_MAP_FN, LAYOUTS, MESSAGES, SHAREGPT, TURNS, Layout

QUESTIONS = (
    "What is the capital of France?",
    "请用一句话介绍上海。",
    "Write a function that adds two numbers.",
    "Was ist der Unterschied zwischen <b> und <strong>?",
    "من نویسنده‌ام\u200cها",
    "Which emoji is 👩\u200d🚀? And why is 3 < 5 | 7 > 2?",
    "Translate:\n\t- one\n\t- two",
    "List [1, 2], {3: 4} and </s-bend> in order.",
)
ANSWERS = (
    "Paris.",
    "上海是一座沿江靠海的大城市。",
    "```python\ndef add(a, b):\n    return a + b\n```",
    "Keiner, den man sieht…",
    "None of them",
    "An astronaut; 3 is less than 5.",
    "1. uno\n2. dos",
    "No",
)


def good_row(layout: Layout, number: int, rng: random.Random) -> dict[str, Any]:
    """A row with nothing wrong, different for each number."""
    ask = f"{rng.choice(QUESTIONS)} ({number})"
    row: dict[str, Any] = {}
    for name, kind in layout.fields.items():
        if kind == TURNS:
            row[name] = [
                {"system": "Be brief.", "input": f"{ask} {turn}", "output": rng.choice(ANSWERS)}
                for turn in range(rng.randint(1, 3))
            ]
        elif kind in (MESSAGES, SHAREGPT):
            row[name] = good_messages(layout, kind, ask, rng)
        else:
            row[name] = ask
    texts = list(layout.fields)
    if layout.fields[texts[-1]] not in (TURNS, MESSAGES, SHAREGPT):
        row[texts[-1]] = f"{rng.choice(ANSWERS)} {number}"
    if layout.name == "colors":
        row["description"] = f"Color name {number}: like the sea"
    if layout.name == "oasst1":
        row["text"] = f"### Human: {ask} ### Assistant: {rng.choice(ANSWERS)}"
    if layout.name == "llava":
        row["conversations"][0]["value"] = ask
    if rng.random() < 0.5:
        row["source"] = f"made/{number}"
    return row


def good_messages(layout: Layout, kind: str, ask: str, rng: random.Random) -> list[dict[str, Any]]:
    """A list of messages whose roles are in order."""
    role, content = ("from", "value") if kind == SHAREGPT else ("role", "content")
    roles = {meaning: name for name, meaning in (layout.roles or {}).items()}
    roles = {**roles, "user": "human" if "human" in (layout.roles or {}) else "user"}
    roles["assistant"] = "gpt" if "gpt" in (layout.roles or {}) else "assistant"
    messages = []
    if kind == MESSAGES and rng.random() < 0.5:
        messages.append({role: "system", content: "Be brief."})
    for turn in range(rng.randint(1, 3)):
        messages.append({role: roles["user"], content: f"{ask} {turn}"})
        messages.append(
            {role: roles["assistant"], content: f"{rng.choice(ANSWERS)} {rng.random()}"}
        )
    return messages


def good_rows(name: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Good rows of a layout by its name."""
    rng = random.Random(seed)
    return [good_row(LAYOUTS[name], number, rng) for number in range(count)]


def as_jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@dataclass(frozen=True)
class Fault:
    """A faulty file: ``text`` is the whole of it."""

    name: str
    map_fn: str
    text: str
    code: str
    line: int
    suffix: str = ".jsonl"

    @property
    def layout(self) -> Layout:
        return BY_MAP_FN[self.map_fn] if self.map_fn else LAYOUTS["xtuner"]


GOOD_BEFORE = 4
"""Good rows before the faulty one, so that the fault is on line 5."""


def _among(name: str, layout: str, bad: Any, code: str) -> Fault:
    """A fault in one row among good ones; ``bad`` is the row, or its line as text."""
    rows = good_rows(layout, 7, seed=len(name))
    before, after = as_jsonl(rows[:GOOD_BEFORE]), as_jsonl(rows[GOOD_BEFORE:])
    line = bad + "\n" if isinstance(bad, str) else json.dumps(bad) + "\n"
    return Fault(name, LAYOUTS[layout].map_fn, before + line + after, code, GOOD_BEFORE + 1)


def _alpaca(**changed: Any) -> dict[str, Any]:
    row = {"instruction": "Name a river.", "input": "In Europe.", "output": "The Rhine.", **changed}
    return {key: value for key, value in row.items() if value is not ...}


def _turns(*turns: Any) -> dict[str, Any]:
    return {"conversation": list(turns)}


def _turn(input: Any = "Name a river.", output: Any = "The Rhine.", **more: Any) -> dict[str, Any]:
    return {"input": input, "output": output, **more}


def _chat(*messages: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


def _gpt(*messages: tuple[str, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": value} for role, value in messages]}


def _pair(chosen: str, rejected: str) -> dict[str, Any]:
    return {"system": "", "question": "Name a river.", "chosen": chosen, "rejected": rejected}


ASK, SAY = ("user", "Name a river."), ("assistant", "The Rhine.")

_IN_ROWS: tuple[tuple[str, str, Any, str], ...] = (
    # unreadable lines
    ("brace open", "alpaca", '{"instruction": "a", "input": "b", "output": "c"', "bad-json"),
    ("quote open", "alpaca", '{"instruction": "a", "input": "b", "output": "c}', "bad-json"),
    ("comma missing", "alpaca", '{"instruction": "a" "input": "b", "output": "c"}', "bad-json"),
    ("comma too many", "alpaca", '{"instruction": "a", "input": "b", "output": "c",}', "bad-json"),
    ("single quotes", "alpaca", "{'instruction': 'a', 'input': 'b', 'output': 'c'}", "bad-json"),
    ("python None", "alpaca", '{"instruction": None, "input": "b", "output": "c"}', "bad-json"),
    ("text after a value", "default", '{"input": "a", "output": "b"} and more', "bad-json"),
    ("no json at all", "default", "input,output", "bad-json"),
    ("raw tab", "default", '{"input": "a\tb", "output": "c"}', "bad-json"),
    ("bad escape", "default", '{"input": "a\\x41", "output": "c"}', "bad-json"),
    ("comment", "default", "// the second part", "bad-json"),
    ("half escape", "pretrain", '{"text": "a\\u12"}', "bad-json"),
    # rows that are no objects
    ("a list", "alpaca", ["a", "b", "c"], "not-an-object"),
    ("a text", "default", '"hello"', "not-an-object"),
    ("a number", "default", "5", "not-an-object"),
    ("null", "pretrain", "null", "not-an-object"),
    # fields
    ("no output", "alpaca", _alpaca(output=...), "missing-field"),
    ("typo in output", "alpaca", _alpaca(output=..., ouput="The Rhine."), "missing-field"),
    ("capital letter", "alpaca", _alpaca(instruction=..., Instruction="a"), "missing-field"),
    ("no instruction", "medical", _alpaca(instruction=..., query="a"), "missing-field"),
    ("empty object", "default", {}, "missing-field"),
    ("no answer field", "sql", {"context": "a", "question": "b"}, "missing-field"),
    ("no title", "arxiv", {"abstract": "a"}, "missing-field"),
    ("no completion", "code_alpaca", {"prompt": "a"}, "missing-field"),
    ("no color", "colors", {"description": "Sea: blue"}, "missing-field"),
    ("no text", "pretrain", {"content": "a"}, "missing-field"),
    ("turn without output", "xtuner", _turns({"input": "a"}), "missing-field"),
    ("turn without input", "xtuner", _turns({"question": "q", "output": "a"}), "missing-field"),
    ("second turn broken", "xtuner", _turns(_turn(), {"input": "a"}), "missing-field"),
    ("message without content", "openai", {"messages": [{"role": "user"}]}, "missing-field"),
    # types
    ("number output", "alpaca", _alpaca(output=5), "not-text"),
    ("null output", "alpaca", _alpaca(output=None), "wrong-type"),
    ("list output", "alpaca", _alpaca(output=["a"]), "wrong-type"),
    ("object input", "alpaca", _alpaca(input={"a": 1}), "wrong-type"),
    ("true output", "default", {"input": "a", "output": True}, "not-text"),
    ("float input", "default", {"input": 0.5, "output": "a"}, "not-text"),
    ("null text", "pretrain", {"text": None}, "wrong-type"),
    ("conversation is text", "xtuner", {"conversation": "[{}]"}, "wrong-type"),
    ("turn is a list", "xtuner", {"conversation": [["a", "b"]]}, "wrong-type"),
    ("turn output number", "xtuner", _turns(_turn(output=3)), "not-text"),
    ("loss as text", "xtuner", _turns(_turn(output_with_loss="yes")), "wrong-type"),
    ("messages is text", "openai", {"messages": "[]"}, "wrong-type"),
    ("message is text", "openai", {"messages": ["hi"]}, "wrong-type"),
    ("content null", "openai", _chat(ASK, ("assistant", None)), "wrong-type"),
    ("content number", "openai", _chat(ASK, ("assistant", 7)), "not-text"),
    ("loss misspelt", "openai",
     {"messages": [{"role": "user", "content": "a"},
                   {"role": "assistant", "content": "b", "loss": "maybe"}]}, "wrong-type"),
    ("value is a list", "wizardlm", _gpt(("human", ["a"]), ("gpt", "b")), "wrong-type"),
    # roles
    ("robot", "openai", _chat(ASK, ("robot", "The Rhine.")), "bad-role"),
    ("role with space", "openai", _chat(("user ", "a"), SAY), "bad-role"),
    ("bing", "wizardlm", _gpt(("human", "a"), ("bing", "b")), "bad-role"),
    ("role in wizardlm", "wizardlm", _gpt(("user", "a"), ("assistant", "b")), "bad-role"),
    ("assistant first", "openai", _chat(SAY, ASK, SAY), "role-order"),
    ("two answers", "openai", _chat(ASK, SAY, SAY), "role-order"),
    ("two questions", "openai", _chat(ASK, ASK, SAY), "role-order"),
    ("tool after user", "openai", _chat(ASK, ("tool", "12"), SAY), "role-order"),
    ("gpt first", "wizardlm", _gpt(("gpt", "a"), ("human", "b"), ("gpt", "c")), "role-order"),
    ("gpt twice", "wizardlm", _gpt(("human", "b"), ("gpt", "c"), ("gpt", "d")), "role-order"),
    ("question left", "openai", _chat(ASK, SAY, ASK), "unanswered"),
    ("human left", "wizardlm", _gpt(("human", "a"), ("gpt", "b"), ("human", "c")), "unanswered"),
    ("oasst left", "oasst1", {"text": "### Human: a ### Assistant: b ### Human: c"}, "unanswered"),
    # nothing to train on
    ("only a question", "openai", _chat(ASK), "no-answer"),
    ("only a system text", "openai", _chat(("system", "Be brief.")), "no-answer"),
    ("no messages", "openai", {"messages": []}, "no-answer"),
    ("no turns", "xtuner", {"conversation": []}, "no-answer"),
    ("no conversations", "wizardlm", {"conversations": []}, "no-answer"),
    ("nooutput", "alpaca", _alpaca(output="<nooutput>"), "no-answer"),
    ("no marks", "oasst1", {"text": "hello"}, "no-answer"),
    ("loss off", "xtuner", _turns(_turn(output_with_loss=False)), "not-trained"),
    ("loss off twice", "xtuner",
     _turns(_turn(output_with_loss=False), _turn(output_with_loss=False)), "not-trained"),
    ("openai loss off", "openai",
     {"messages": [{"role": "user", "content": "a"},
                   {"role": "assistant", "content": "b", "loss": False}]}, "not-trained"),
    # empty
    ("empty output", "alpaca", _alpaca(output=""), "empty-answer"),
    ("blank output", "alpaca", _alpaca(output=" \n\t"), "empty-answer"),
    ("empty turn output", "xtuner", _turns(_turn(), _turn(output="")), "empty-answer"),
    ("empty text", "pretrain", {"text": "  "}, "empty-answer"),
    ("empty assistant", "openai", _chat(ASK, ("assistant", "")), "empty-answer"),
    ("empty question", "alpaca", _alpaca(instruction="", input=""), "empty-question"),
    ("empty input", "default", {"input": "", "output": "a"}, "empty-question"),
    ("empty turn input", "xtuner", _turns(_turn(), _turn(input="")), "empty-question"),
    ("no colon", "colors", {"description": "blue", "color": "#00f"}, "empty-question"),
    ("nan", "default", {"input": "a", "output": "nan"}, "placeholder"),
    ("null as text", "default", {"input": "a", "output": "null"}, "placeholder"),
    ("javascript", "openai", _chat(ASK, ("assistant", "[object Object]")), "placeholder"),
    # template tokens
    ("chatml", "alpaca", _alpaca(output="The Rhine.<|im_end|>"), "template-token"),
    ("eot", "openai", _chat(ASK, ("assistant", "a<|eot_id|>")), "template-token"),
    ("inst", "default", {"input": "[INST] a [/INST]", "output": "b"}, "template-token"),
    ("gemma", "default", {"input": "a", "output": "b<end_of_turn>"}, "template-token"),
    ("eoa", "alpaca", _alpaca(output="The Rhine.<eoa>"), "template-token"),
    ("endoftext", "pretrain", {"text": "one<|endoftext|>two"}, "template-token"),
    ("deepseek", "default", {"input": "a", "output": "b<｜end▁of▁sentence｜>"}, "template-token"),
    # characters
    ("zero width", "alpaca", _alpaca(output="The\u200bRhine."), "invisible"),
    ("byte order mark", "alpaca", _alpaca(instruction="\ufeffName a river."), "invisible"),
    ("bell", "default", {"input": "a\x07", "output": "b"}, "invisible"),
    ("right to left", "default", {"input": "a", "output": "b\u202ec"}, "invisible"),
    ("soft hyphen", "pretrain", {"text": "Donau\u00addampf"}, "invisible"),
    ("replaced", "alpaca", _alpaca(output="caf\ufffd"), "broken-unicode"),
    ("half an emoji", "default", {"input": "a", "output": "b\ud83d"}, "bad-json"),
    # others
    ("chat row in alpaca", "alpaca", _chat(ASK, SAY), "mixed-layouts"),
    ("sql row in orca", "openorca", {"context": "a", "question": "b", "answer": "c"},
     "mixed-layouts"),
    ("no choice", "intel_orca_dpo", _pair("The Rhine.", "The Rhine."), "same-choice"),
    ("rejected number", "intel_orca_dpo", _pair("The Rhine.", 3), "not-text"),  # type: ignore[arg-type]
)  # fmt: skip

GOOD = as_jsonl(good_rows("alpaca", 3, seed=1))
_OTHERS = (
    Fault("twice", "alpaca_map_fn", GOOD + GOOD.splitlines()[1] + "\n", "duplicate", 4),
    Fault("array broken", "default_map_fn",
          '[\n  {"input": "a", "output": "b"},\n  {"input": "c" "output": "d"},\n'
          '  {"input": "e", "output": "f"}\n]\n', "bad-json", 3, ".json"),
    Fault("array open", "default_map_fn", '[\n  {"input": "a", "output": "b"}\n', "bad-json", 3,
          ".json"),
    Fault("array without comma", "default_map_fn",
          '[\n  {"input": "a", "output": "b"}\n  {"input": "c", "output": "d"}\n]', "bad-json", 2,
          ".json"),
    Fault("empty file", "default_map_fn", "", "no-rows", 1),
    Fault("empty array", "default_map_fn", "[]", "no-rows", 1, ".json"),
    Fault("csv short", "default_map_fn", 'input,output\n"a\nb",c\nd\n', "bad-json", 4, ".csv"),
    Fault("csv empty cell", "default_map_fn", "input,output\na,b\nc,\n", "empty-answer", 3, ".csv"),
    Fault("wrong map", "alpaca_map_fn", as_jsonl(good_rows("openai", 3, seed=2)),
          "wrong-map-fn", 1),
    Fault("default for alpaca", "default_map_fn", GOOD, "wrong-map-fn", 1),
    Fault("no map for openai", "", as_jsonl(good_rows("openai", 3, seed=3)), "wrong-map-fn", 1),
    Fault("wizardlm for alpaca", "wizardlm_map_fn", GOOD, "wrong-map-fn", 1),
)  # fmt: skip

FAULTS = [*(_among(*fault) for fault in _IN_ROWS), *_OTHERS]
