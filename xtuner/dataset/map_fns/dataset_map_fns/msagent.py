"""ModelScope's agent data as ReAct: thoughts, actions, and results of the tools."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]

_THINK = re.compile(r"<\|startofthink\|>(.*?)<\|endofthink\|>", re.DOTALL)
_EXEC = re.compile(r"<\|startofexec\|>(.*?)<\|endofexec\|>", re.DOTALL)


def msagent_react_map_fn(example: Row) -> dict[str, list[dict[str, Any]]]:
    """``conversations`` (a list, or its text) of ``{from: system | user | assistant, value}``."""
    messages = example["conversations"]
    if isinstance(messages, str):
        messages = ast.literal_eval(messages)
    turns: list[dict[str, Any]] = []
    system, question = "", ""
    for message in messages:
        who, value = message["from"], str(message["value"])
        if who == "system":
            system = _tools_prompt(value)
        elif who == "user":
            question += value + "\n"
        elif who == "assistant" and (question or turns):
            for part in _steps(value):
                turns.append({"system": system, "input": question, "output": part["output"]})
                system, question = part["response"], ""
    return {"conversation": turns}


def _steps(text: str) -> list[dict[str, str]]:
    """An answer as ReAct steps: each call of a tool, then the final words."""
    thought = _THINK.search(text)
    if thought is None:
        return [{"output": f"Final Answer: {text.strip()}", "response": ""}]
    call = json.loads(thought[1].strip().strip("`").removeprefix("JSON").strip())
    before = text[: thought.start()].strip()
    action = call.get("api_name", call.get("name", ""))
    arguments = json.dumps(call.get("parameters", {}), ensure_ascii=False)
    steps = [
        {
            "output": f"Thought:{before}\nAction:{action}\nAction Input:{arguments}",
            "response": "",
        }
    ]
    result = _EXEC.search(text)
    if result is not None:
        found = result[1].strip().strip("`").removeprefix("JSON").strip()
        steps[0]["response"] = f"Response:{found}"
        steps.append({"output": f"Final Answer:{text[result.end() :].strip()}", "response": ""})
    return steps


def _tools_prompt(text: str) -> str:
    """The tools found in the system text, explained for ReAct."""
    tools = [tool for tool in _json_objects(text) if "name" in tool]
    lines = ["You can use these tools:"]
    for tool in tools:
        lines.append(f"{tool['name']}: {tool.get('description', '')}")
        paths = tool.get("paths") or [{}]
        for parameter in paths[0].get("parameters", []):
            lines.append(f"  {parameter.get('name')}: {parameter.get('description', '')}")
    lines += [
        "Answer in this form:",
        "Thought: what to do next",
        f"Action: one of [{', '.join(str(tool['name']) for tool in tools)}]",
        "Action Input: the tool's arguments as JSON",
        "Response: what the tool gave",
        "Final Answer: the answer to the question",
    ]
    return "\n".join(lines) + "\n"


def _json_objects(text: str) -> list[dict[str, Any]]:
    decoder = json.JSONDecoder()
    found, place = [], text.find("{")
    while place >= 0:
        try:
            value, end = decoder.raw_decode(text, place)
        except ValueError:
            end = place + 1
        else:
            found.append(value)
        place = text.find("{", end)
    return found
