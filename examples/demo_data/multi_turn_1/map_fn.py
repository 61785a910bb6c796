"""Turns a row of data.json, which holds a list of turns, into a conversation."""


def multi_turn_1_map_fn(example):
    conversation = [
        {"input": turn["toy_input"], "output": turn["toy_output"]} for turn in example["toy_turns"]
    ]
    if conversation and example.get("toy_system"):
        conversation[0]["system"] = example["toy_system"]
    return {"conversation": conversation}
