"""Pairs of answers: ids and masks, layouts, packing that keeps pairs whole, and what is cut."""

import itertools
import json

import pytest
from datasets import Dataset, load_dataset

from tests.helpers.tiny import make_tokenizer
from xtuner.dataset.preference_dataset import (
    build_preference_dataset,
    intel_orca_dpo_map_fn,
    load_jsonl_dataset,
    orpo_dpo_mix_40k_map_fn,
)
from xtuner.dataset.prepare.token_stats import token_stats_of
from xtuner.utils.errors import UserError

USER = {"role": "user", "content": "What is the capital of France?"}
GOOD = {"role": "assistant", "content": "The capital is Paris."}
BAD = {"role": "assistant", "content": "no"}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def build(tokenizer, rows, **settings):
    settings = {"max_length": 128, **settings}
    return build_preference_dataset(Dataset.from_list(rows), tokenizer, **settings)


def answer_of(row, side, tokenizer):
    labels = [label for label in row[f"{side}_labels"] if label != -100]
    return tokenizer.decode(labels)


@pytest.mark.parametrize(
    ("row", "map_fn"),
    [
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, None),
        ({"prompt": USER["content"], "chosen": GOOD["content"], "rejected": BAD["content"]}, None),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, None),
        (
            {"prompt": USER["content"], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            None,
        ),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, orpo_dpo_mix_40k_map_fn),
        (
            {
                "conversations": [{"from": "human", "value": USER["content"]}],
                "chosen": {"from": "gpt", "value": GOOD["content"]},
                "rejected": {"from": "gpt", "value": BAD["content"]},
            },
            None,
        ),
        (
            {
                "instruction": USER["content"],
                "input": "",
                "chosen": GOOD["content"],
                "rejected": BAD["content"],
            },
            None,
        ),
        ({"messages": [USER, GOOD], "rejected_response": BAD["content"]}, None),
        ({"messages": [USER, GOOD], "rejected_messages": [USER, BAD]}, None),
        (
            {
                "query": USER["content"],
                "response": GOOD["content"],
                "rejected_response": BAD["content"],
            },
            None,
        ),
    ],
)
def test_every_layout_gives_the_same_ids(tokenizer, row, map_fn):
    (made,) = build(tokenizer, [row], dataset_map_fn=map_fn)
    text = tokenizer.apply_chat_template([USER, GOOD], tokenize=False)
    assert made["chosen_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert answer_of(made, "chosen", tokenizer) == "The capital is Paris.<|im_end|>\n"
    assert answer_of(made, "rejected", tokenizer) == "no<|im_end|>\n"
    assert made["length"] == len(made["chosen_ids"]) + len(made["rejected_ids"])


def test_intel_orca_has_a_system_prompt(tokenizer):
    row = {"system": "Be short.", "question": "add", "chosen": "a + b", "rejected": "a - b"}
    (made,) = build(tokenizer, [row], dataset_map_fn=intel_orca_dpo_map_fn)
    assert tokenizer.decode(made["chosen_ids"]).startswith("<|im_start|>system\nBe short.")


def pairs(count):
    return [
        {"prompt": f"{n} " * (n + 1), "chosen": "yes " * (n % 5 + 1), "rejected": f"no {n}"}
        for n in range(count)
    ]


def test_a_system_prompt_and_earlier_turns_of_another_layout_are_kept(tokenizer):
    system = {"role": "system", "content": "Be brief."}
    talk = [USER, BAD, {"role": "user", "content": "Think."}]
    row = {"system": "Be brief.", "messages": [*talk, GOOD], "rejected_response": BAD["content"]}
    (made,) = build(tokenizer, [row])
    text = tokenizer.apply_chat_template([system, *talk, GOOD], tokenize=False)
    assert made["chosen_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert answer_of(made, "rejected", tokenizer) == "no<|im_end|>\n"


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "answer": "a", "rejected_response": "b"},  # under another name
        {"messages": [USER], "rejected_response": "b"},
        {"messages": [USER, GOOD], "chosen_response": "a"},
    ],
)
def test_a_row_of_another_layout_without_an_answer_is_named(tokenizer, row):
    with pytest.raises(UserError, match="answer"):
        build(tokenizer, [row])


def test_packing_keeps_pairs_whole_and_loses_nothing(tokenizer):
    single = build(tokenizer, pairs(20))
    packed = build(tokenizer, pairs(20), use_varlen_attn=True, max_packed_length=256)
    assert len(packed) < 20
    found = {}
    for row in packed:
        cu_seqlens = row["cumulative_len"]
        assert len(cu_seqlens) == 2 * len(row["rows"]) + 1
        samples = [row["input_ids"][a:b] for a, b in itertools.pairwise(cu_seqlens)]
        found |= dict(zip(row["rows"], zip(samples[::2], samples[1::2], strict=True), strict=True))
        assert row["position_ids"][cu_seqlens[1]] == 0
    assert sorted(found) == list(range(20))
    for row in single:
        assert found[row["rows"][0]] == (row["chosen_ids"], row["rejected_ids"])


def test_a_reward_token_ends_each_answer(tokenizer):
    (made,) = build(tokenizer, pairs(1), is_dpo=False, is_reward=True, reward_token_id=2)
    for side, label in (("chosen", 0), ("rejected", 1)):
        assert made[f"{side}_ids"][-1] == 2
        assert made[f"{side}_labels"] == [-100] * (len(made[f"{side}_ids"]) - 1) + [label]


def test_what_is_cut_or_dropped_is_accounted_for(tokenizer):
    rows = [
        {"prompt": "hi", "chosen": "x " * 40, "rejected": "y " * 40},
        {"prompt": "long " * 60, "chosen": "a", "rejected": "b"},
        {"prompt": "hi", "chosen": "a", "rejected": "b"},
    ]
    made = build(tokenizer, rows, max_length=48)
    stats = token_stats_of(made)
    assert [row["rows"] for row in made] == [[0], [2]]
    assert (stats.rows_truncated, stats.dropped["no_label"]) == ([0], [1])
    assert stats.tokens_in == (stats.tokens_trained + stats.tokens_truncated + stats.tokens_dropped)


def test_a_row_that_is_no_pair_is_named(tokenizer):
    with pytest.raises(UserError, match="row 1 is no pair"):
        build(tokenizer, [*pairs(1), {"prompt": "hi", "chosen": "a", "rejected": None}])
    with pytest.raises(UserError, match="same messages"):
        build(tokenizer, [{"chosen": [USER, GOOD], "rejected": [BAD, BAD]}])


def test_a_row_of_a_file_that_is_no_pair_is_named_by_its_line(tokenizer, tmp_path):
    file = tmp_path / "a.jsonl"
    null = {"prompt": "hi", "chosen": [{**GOOD, "content": None}], "rejected": [BAD]}
    rows = [{"prompt": "hi", "chosen": [GOOD], "rejected": [BAD]}, null]
    file.write_text("\n\n".join(map(json.dumps, rows)))
    source = dict(type=load_dataset, path="json", data_files=str(file))
    with pytest.raises(UserError, match=r"a\.jsonl:3 is no pair .*content .* is null"):
        build_preference_dataset(source, tokenizer, max_length=128)


@pytest.mark.parametrize(
    "settings",
    [
        dict(is_dpo=True, is_reward=True, reward_token_id=2),
        dict(is_dpo=False, is_reward=True),
        dict(use_varlen_attn=True, max_packed_length=128),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tokenizer, settings):
    with pytest.raises(UserError):
        build(tokenizer, pairs(1), **settings)


def test_a_tokenizer_without_a_chat_template_is_refused():
    with pytest.raises(UserError, match="no chat template"):
        build(make_tokenizer(chat_template=None), pairs(1))


def test_jsonl_files_are_read_and_bad_lines_named(tmp_path):
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file, row in zip(files, pairs(2), strict=True):
        file.write_text(json.dumps(row) + "\n\n", "utf-8")
    assert list(load_jsonl_dataset([str(file) for file in files])) == pairs(2)
    files[1].write_text('{"prompt": \n', "utf-8")
    with pytest.raises(UserError) as caught:
        load_jsonl_dataset(str(files[1]))
    assert caught.value.where.line == 1
