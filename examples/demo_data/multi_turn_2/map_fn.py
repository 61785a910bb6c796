"""Turns a row of data.json, which holds a list of messages, into a conversation."""


def multi_turn_2_map_fn(example):
    conversation, turn = [], {}
    for message in example["toy_messages"]:
        if message["speaker"] == "system":
            turn["system"] = message["words"]
        elif message["speaker"] == "user":
            turn["input"] = message["words"]
        else:
            turn["output"] = message["words"]
            conversation.append(turn)
            turn = {}
    return {"conversation": conversation}
