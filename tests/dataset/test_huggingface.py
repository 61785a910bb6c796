"""process_hf_dataset: ids and masks, packing that loses nothing, the account, the cache."""

import functools
import importlib
import itertools
import random

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.tiny import make_tokenizer
from xtuner.dataset import ConcatDataset, huggingface, process_hf_dataset
from xtuner.dataset.collate_fns import default_collate_fn
from xtuner.dataset.map_fns import default_map_fn, openai_map_fn, template_map_fn_factory
from xtuner.dataset.prepare.packing import pack_stream, pack_whole
from xtuner.dataset.prepare.token_stats import token_stats_of
from xtuner.utils import PROMPT_TEMPLATE
from xtuner.utils.errors import UserError

IGNORED = -100
TEMPLATES = sorted(set(PROMPT_TEMPLATE) - {"auto"})


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XTUNER_CACHE", str(tmp_path / "cache"))


def rows(count=9, seed=0):
    words = [
        "Paris",
        "is",
        "the",
        "capital",
        "of",
        "France",
        "and",
        "walks",
        "are",
        "good",
        "for",
        "staying",
        "healthy",
    ]
    draw = random.Random(seed)
    return Dataset.from_list(
        [
            {
                "input": f"question {i}: {' '.join(draw.choices(words, k=draw.randint(1, 5)))}",
                "output": " ".join(draw.choices(words, k=draw.randint(1, 14))),
            }
            for i in range(count)
        ]
    )


def prepared(tokenizer, data=None, **settings):
    defaults = dict(
        tokenizer=tokenizer,
        max_length=64,
        dataset_map_fn=default_map_fn,
        template_map_fn=template_map_fn_factory(PROMPT_TEMPLATE.default),
        pack_to_max_length=False,
    )
    return process_hf_dataset(rows() if data is None else data, **(defaults | settings))


def published(tokenizer, row, template):
    """The published encoding of one single-turn row, written out: every piece by itself."""

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)

    ends = not template.get("SUFFIX_AS_EOS", False)
    question = template["INSTRUCTION"].replace("{input}", row["input"]).replace("{round}", "1")
    segments = [
        ([tokenizer.bos_token_id], False),
        (encode(question), False),
        (encode(row["output"] + template.get("SUFFIX", "")), True),
        ([tokenizer.eos_token_id] if ends else [], True),
        (encode(template.get("SEP", "")), False),
    ]
    ids = [token for piece, _ in segments for token in piece]
    labels = [token if trained else IGNORED for piece, trained in segments for token in piece]
    return ids, labels


@pytest.mark.parametrize("kind", ["byte_level", "bos_eos"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_labels_are_the_published_ones(name, kind):
    tokenizer = make_tokenizer(kind)
    template = PROMPT_TEMPLATE[name]
    data = rows(4)
    made = prepared(
        tokenizer, data, max_length=2048, template_map_fn=template_map_fn_factory(template)
    )
    for row, sample in zip(data, made, strict=True):
        assert (sample["input_ids"], sample["labels"]) == published(tokenizer, row, template)


@pytest.mark.parametrize("name", TEMPLATES)
def test_with_metaspace_only_the_leading_space_of_a_piece_differs(name):
    """The one difference on purpose (docs/en/migration.md): a piece goes on after what precedes it.

    Published, every piece is tokenised as if it began a text, and so begins with a space that the
    text has not; here the decoded text is the text.
    """
    tokenizer = make_tokenizer("metaspace")
    template = PROMPT_TEMPLATE[name]
    data = rows(4)
    made = prepared(
        tokenizer, data, max_length=2048, template_map_fn=template_map_fn_factory(template)
    )
    for row, sample in zip(data, made, strict=True):
        ids, _ = published(tokenizer, row, template)
        ends = not template.get("SUFFIX_AS_EOS", False)
        question = template["INSTRUCTION"].replace("{input}", row["input"]).replace("{round}", "1")
        answer = row["output"] + template.get("SUFFIX", "") + (tokenizer.eos_token if ends else "")
        text = tokenizer.bos_token + question + answer + template.get("SEP", "")
        whole = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(sample["input_ids"]) == tokenizer.decode(whole)
        trained = [token for token in sample["labels"] if token != IGNORED]
        alone = tokenizer.encode(answer, add_special_tokens=False)
        assert tokenizer.decode(trained).strip() == tokenizer.decode(alone).strip()
        assert len(sample["input_ids"]) <= len(ids)  # never a space more than published


def test_the_tokenizers_own_template_trains_the_answers_alone(tokenizer):
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello you"},
        {"role": "user", "content": "bye"},
        {"role": "assistant", "content": "good bye"},
    ]
    made = prepared(
        tokenizer,
        Dataset.from_list([{"messages": messages}]),
        dataset_map_fn=openai_map_fn,
        template_map_fn=template_map_fn_factory(PROMPT_TEMPLATE.auto),
    )
    (sample,) = made
    assert sample["input_ids"] == tokenizer.apply_chat_template(messages, return_dict=False)
    trained = tokenizer.decode([token for token in sample["labels"] if token != IGNORED])
    assert trained == "hello you<|im_end|>good bye<|im_end|>"


def supervised(dataset):
    return sorted(token for row in dataset for token in row["labels"] if token != IGNORED)


@pytest.mark.parametrize("varlen", [False, True])
def test_packing_loses_no_token(tokenizer, varlen):
    alone = prepared(tokenizer, max_length=4096)
    packed = prepared(tokenizer, pack_to_max_length=True, use_varlen_attn=varlen, max_length=150)
    assert len(packed) < len(alone)
    assert max(packed["length"]) <= 150
    assert supervised(packed) == supervised(alone)


def test_packed_samples_are_whole_and_traced(tokenizer):
    data = rows(12)
    alone = prepared(tokenizer, data, max_length=200)
    packed = prepared(
        tokenizer, data, pack_to_max_length=True, use_varlen_attn=True, max_length=200
    )
    seen = []
    for row in packed:
        for (a, b), number in zip(
            itertools.pairwise(row["cumulative_len"]), row["rows"], strict=True
        ):
            assert row["input_ids"][a:b] == alone[number]["input_ids"]
            assert row["position_ids"][a:b] == list(range(b - a))
            seen.append(number)
    assert sorted(seen) == list(range(12))


@given(st.lists(st.integers(1, 40), max_size=60))
@settings(max_examples=50, deadline=None)
def test_packs_hold_every_token_once(lengths):
    whole = pack_whole(lengths, 40)
    assert sorted(part for row in whole for part in row) == [
        (number, 0, length) for number, length in enumerate(lengths)
    ]
    for pack in (whole, pack_stream(lengths, 40)):
        assert all(sum(stop - start for _, start, stop in row) <= 40 for row in pack)
        tokens = [(n, t) for row in pack for n, a, b in row for t in range(a, b)]
        assert sorted(tokens) == [(n, t) for n, length in enumerate(lengths) for t in range(length)]


@pytest.mark.parametrize("policy", ["cut", "split", "drop"])
def test_the_account_adds_up(tokenizer, policy):
    data = Dataset.from_list([*rows(3), {"input": "long", "output": "word " * 300}])
    made = prepared(tokenizer, data, max_length=60, long_samples=policy)
    stats = token_stats_of(made)
    assert stats.rows_in == 4
    assert stats.tokens_in == (stats.tokens_trained + stats.tokens_truncated + stats.tokens_dropped)
    assert stats.tokens_trained == sum(made["length"])
    assert stats.rows_truncated == ([3] if policy == "cut" else [])
    assert stats.dropped["too_long"] == ([3] if policy == "drop" else [])


def test_long_samples_can_be_refused(tokenizer):
    with pytest.raises(UserError, match=r"row 0 has .* more than max_length=8"):
        prepared(tokenizer, max_length=8, long_samples="error")


def test_a_wrong_map_function_names_the_row_and_its_fields(tokenizer):
    with pytest.raises(UserError, match=r"row 0: openai_map_fn .* input, output"):
        prepared(tokenizer, dataset_map_fn=openai_map_fn)


def test_rows_without_a_map_function_say_what_is_missing(tokenizer):
    with pytest.raises(UserError, match="row 0: it has no 'conversation'"):
        prepared(tokenizer, dataset_map_fn=None)


def test_the_second_time_comes_from_the_cache(tokenizer, monkeypatch):
    data = rows()
    first = prepared(tokenizer, data)
    monkeypatch.setattr(huggingface, "encode_rows", lambda *_: pytest.fail("prepared again"))
    assert prepared(tokenizer, data).to_dict() == first.to_dict()
    assert token_stats_of(prepared(tokenizer, data)) == token_stats_of(first)


@pytest.mark.parametrize(
    "chosen",
    [
        dict(pack_to_max_length=True),
        dict(pack_to_max_length=True, use_varlen_attn=True),
        dict(max_length=60, long_samples="split"),
        dict(max_length=60, remove_unused_columns=True),
        dict(max_length=60, long_samples="drop", pack_to_max_length=True, use_varlen_attn=True),
        dict(train_on="everything", val_size=2),
    ],
    ids=str,
)
def test_what_the_doctor_has_encoded_is_not_encoded_again(tokenizer, chosen, tmp_path, monkeypatch):
    data = Dataset.from_list([*rows(5), {"input": "long", "output": "word " * 300}, *rows(3)])
    made = prepared(tokenizer, data, **chosen)
    monkeypatch.setenv("XTUNER_CACHE", str(tmp_path / "another"))
    as_the_doctor = dict(max_length=None, long_samples="cut", pack_to_max_length=False)
    as_the_doctor |= dict(bad_rows="drop", remove_unused_columns=True)
    prepared(tokenizer, data, **(chosen | as_the_doctor))
    monkeypatch.setattr(huggingface, "encode_rows", lambda *_: pytest.fail("encoded again"))
    again = prepared(tokenizer, data, **chosen)
    assert again.to_dict() == made.to_dict()
    assert token_stats_of(again) == token_stats_of(made)


def test_with_rows_left_out_they_are_encoded_again(tokenizer):
    good, bad = {"input": "q", "output": "a"}, {"input": "q", "output": None}
    data = Dataset.from_list([good, bad, {"input": "q " * 90, "output": "a"}])
    loose = dict(max_length=None, bad_rows="drop", remove_unused_columns=True)
    assert len(prepared(tokenizer, data, **loose)) == 2
    with pytest.raises(UserError, match="row 1"):
        prepared(tokenizer, data)
    made = prepared(tokenizer, data, bad_rows="drop", max_length=20)
    assert token_stats_of(made).dropped["bad"] == [1]


def test_another_setting_is_another_cache_entry(tokenizer):
    data = rows()
    assert max(prepared(tokenizer, data, max_length=20)["length"]) == 20
    assert max(prepared(tokenizer, data, max_length=21)["length"]) == 21


def test_padded_and_packed_batches(tokenizer):
    made = prepared(tokenizer, rows(3))
    batch = default_collate_fn(list(made), pad_index=2)["data"]
    lengths = made["length"]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["input_ids"].shape == (3, max(lengths))
    joined = default_collate_fn(list(made), use_varlen_attn=True)["data"]
    assert joined["input_ids"].shape == (1, sum(lengths))
    assert joined["cumulative_len"][0].tolist() == list(itertools.accumulate([0, *lengths]))
    assert joined["max_seqlen"] == max(lengths)
    assert joined["rows"] == [0, 1, 2]


def test_joined_datasets_keep_all_rows(tokenizer):
    parts = [prepared(tokenizer, rows(n, seed=n)) for n in (2, 3)]
    joined = ConcatDataset(parts)
    assert len(joined) == 5
    assert joined.length == [*parts[0]["length"], *parts[1]["length"]]


def asked(row, prefix=""):
    return {"conversation": [{"input": prefix + row["input"], "output": row["output"]}]}


def closure(prefix):
    return lambda row: asked(row, prefix)


def test_what_a_map_function_holds_is_part_of_the_cache(tokenizer):
    made = [
        prepared(tokenizer, dataset_map_fn=function)[0]["input_ids"]
        for function in (
            closure("A "),
            closure("B "),
            functools.partial(asked, prefix="C "),
            functools.partial(asked, prefix="D "),
        )
    ]
    assert len({tuple(ids) for ids in made}) == 4


def test_an_edited_constant_beside_a_map_function_is_part_of_the_cache(
    tokenizer, tmp_path, monkeypatch
):
    text = (
        "PREFIX = {!r}\n"
        "def function(row):\n"
        "    turn = {{'input': PREFIX + row['input'], 'output': row['output']}}\n"
        "    return {{'conversation': [turn]}}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    file = tmp_path / "edited_map_fn.py"
    file.write_text(text.format("A "))
    edited = importlib.import_module("edited_map_fn")
    first = prepared(tokenizer, dataset_map_fn=edited.function)
    file.write_text(text.format("longer "))
    importlib.reload(edited)
    second = prepared(tokenizer, dataset_map_fn=edited.function)
    assert first[0]["input_ids"] != second[0]["input_ids"]


def test_drawn_rows_keep_their_numbers_in_the_source(tokenizer):
    data = rows(20)
    made = prepared(tokenizer, data, max_dataset_length=5)
    assert len(made) == 5
    for sample in made:
        (number,) = sample["rows"]
        assert data[number]["input"] in tokenizer.decode(sample["input_ids"])


def test_a_chat_template_that_rewrites_earlier_turns_is_followed():
    rewriting = make_tokenizer(
        chat_template="{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if loop.last %}{{ m.content }}"
        "{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [{"input": "one", "output": "<think>two</think>three"}, {"input": "a", "output": "b"}]
    samples = prepared(
        rewriting,
        Dataset.from_list([{"conversation": turns}]),
        dataset_map_fn=None,
        template_map_fn=template_map_fn_factory(PROMPT_TEMPLATE.auto),
    )
    trained = [
        rewriting.decode([token for token in sample["labels"] if token != IGNORED])
        for sample in samples
    ]
    assert trained == ["<think>two</think>three<|im_end|>", "b<|im_end|>"]
    assert "<think>" not in rewriting.decode(samples[1]["input_ids"])
