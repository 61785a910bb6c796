"""Turns a row of data.json into text to go on writing: no question, everything is trained."""


def pretrain_map_fn(example):
    return {
        "conversation": [
            {"input": "", "output": example["toy_text"].strip(), "need_eos_token": False}
        ]
    }
