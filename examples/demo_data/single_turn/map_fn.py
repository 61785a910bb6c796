"""Turns a row of data.json into a conversation of one turn."""


def single_turn_map_fn(example):
    return {
        "conversation": [
            {
                "system": example["toy_system"],
                "input": example["toy_input"],
                "output": example["toy_output"],
            }
        ]
    }
