"""The tokenizer's own template: one rendering, and exactly the answers in it are trained."""

import json
from itertools import pairwise

import pytest
from datasets import Dataset
from tokenizers import processors

from tests.helpers.tiny import make_tokenizer
from xtuner.dataset import process_hf_dataset
from xtuner.dataset.map_fns import auto_map_fn, openai_map_fn, template_map_fn_factory
from xtuner.tokenization.messages import encode_messages
from xtuner.tokenization.rendering import rendered
from xtuner.utils import PROMPT_TEMPLATE
from xtuner.utils.constants import IGNORE_INDEX
from xtuner.utils.errors import UserError

# After Qwen3's: tools in front, calls in marks, reasoning of the answers before the last question
# left out, an empty thought in the last answer where none is given.
FORGETS = """
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>
{{ m.reasoning_content or '' }}
</think>

{% endif %}{{ m.content }}
{%- for call in m.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# After DeepSeek-R1's: the prompt opens the thought; an answer that was given has none.
OPENS = """
{%- for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}
{%- else %}<|Assistant|>{{ m.content.split('</think>')[-1] }}<|end|>{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|Assistant|><think>
{% endif %}"""

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
TALK = [
    {"role": "user", "content": "What is 1+2?"},
    {"role": "assistant", "content": "", "reasoning_content": "a sum", "tool_calls": [CALL]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "It is 3.", "reasoning_content": "told"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Sure!", "reasoning_content": "yes"},
]
CALLED = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>'


def tokenizer_with(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def trained_texts(tokenizer, *samples):
    """The trained stretches, each as text."""
    texts, stretch = [], []
    for token in [token for sample in samples for token in [*sample["labels"], IGNORE_INDEX]]:
        if token != IGNORE_INDEX:
            stretch.append(token)
        elif stretch:
            texts.append(tokenizer.decode(stretch))
            stretch = []
    return texts


STEPS = [
    "<think>\na sum\n</think>\n\n" + CALLED,
    "<think>\ntold\n</think>\n\nIt is 3.<|im_end|>",
    "<think>\nyes\n</think>\n\nSure!<|im_end|>",
]


def prompted(tokenizer, samples, messages, **settings):
    """For each answer the ids before it in the samples, and those that chat sends."""
    before = []
    for sample in samples:
        labels = [IGNORE_INDEX, *sample["labels"]]
        starts = [
            n for n, (one, other) in enumerate(pairwise(labels)) if one == IGNORE_INDEX != other
        ]
        before += [sample["input_ids"][:start] for start in starts]
    sent = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            text = tokenizer.apply_chat_template(
                messages[:number], tokenize=False, add_generation_prompt=True, **settings
            )
            sent.append(tokenizer.encode(text, add_special_tokens=False))
    return before, sent


def test_each_answer_is_trained_with_its_reasoning_after_the_prompt_that_chat_sends():
    tokenizer = tokenizer_with(FORGETS)
    samples = encode_messages(TALK, tokenizer, tools=TOOLS)
    calls = [{"function": {"name": "add", "arguments": {"a": 1, "b": 2}}}]
    whole = [dict(message) for message in TALK]
    whole[1]["tool_calls"] = calls
    until = [tokenizer.decode(sample["input_ids"]) for sample in samples]
    text = tokenizer.apply_chat_template(whole, tools=TOOLS, tokenize=False)
    assert until[1] == text  # the earlier answers without their reasoning: they have no loss there
    assert until[0] == tokenizer.apply_chat_template(whole[:4], tools=TOOLS, tokenize=False)[:-1]
    assert trained_texts(tokenizer, *samples) == STEPS
    before, sent = prompted(tokenizer, samples, whole, tools=TOOLS)
    assert before == sent and len(sent) == 3


def test_while_the_tools_are_at_work_one_sample_has_all_reasoning():
    tokenizer = tokenizer_with(FORGETS)
    (sample,) = encode_messages(TALK[:4], tokenizer, tools=json.dumps(TOOLS))
    assert trained_texts(tokenizer, sample) == STEPS[:2]


def test_an_answer_without_loss_and_the_last_alone():
    tokenizer = tokenizer_with(FORGETS)
    silent = [*TALK[:3], {**TALK[3], "loss": False}, *TALK[4:]]
    samples = encode_messages(silent, tokenizer, tools=TOOLS)
    assert trained_texts(tokenizer, *samples) == [STEPS[0], STEPS[2]]
    (last,) = encode_messages(TALK, tokenizer, tools=TOOLS, train_on="last_answer")
    assert trained_texts(tokenizer, last) == [STEPS[2]]
    (everything,) = encode_messages(TALK, tokenizer, tools=TOOLS, train_on="everything")
    assert everything["labels"] == everything["input_ids"]


def dialogue(*turns):
    """Messages of a conversation: questions and answers in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]


def test_a_prompt_that_opens_a_thought_is_followed_by_it():
    tokenizer = tokenizer_with(OPENS)
    talk = dialogue("a?", "<think>\nhm\n</think>A", "b?", "B", "c?", "oh</think>C")
    samples = encode_messages(talk, tokenizer)
    assert trained_texts(tokenizer, *samples) == [
        "hm\n</think>\n\nA<|end|>",
        "\n</think>\n\nB<|end|>",
        "oh\n</think>\n\nC<|end|>",
    ]
    before, sent = prompted(tokenizer, samples, talk)
    assert before == sent  # though the line breaks around an empty thought could be one token
    masked = encode_messages(talk, tokenizer, thinking="mask_empty")
    assert trained_texts(tokenizer, *masked)[1] == "B<|end|>"
    dropped = encode_messages(talk[:4], tokenizer, thinking="drop")
    assert trained_texts(tokenizer, *dropped) == ["A<|end|>", "B<|end|>"]


# After DeepSeek-R1-Distill's first one: the reasoning of an answer is cut off, nothing opens it.
CUTS = OPENS.replace("<think>\n{% endif %}", "{% endif %}")
# After Qwen3's: told not to think, the prompt ends with an empty thought.
SWITCHED = FORGETS.replace(
    "<|im_start|>assistant\n{% endif %}",
    "<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}",
)
# After Mistral's: the system text is in the last question; after gpt-oss's: the last answer alone
# ends with the token at which generation stops.
MOVES = """{%- for m in messages %}{% if m.role == 'user' %}[Q]
{%- if loop.index0 >= messages | length - 2 and messages[0].role == 'system' %}
{{- messages[0].content }} {% endif %}{{ m.content }}[A]{% elif m.role == 'assistant' %}
{{- m.content }}{{ '</s>' if loop.last else '<|im_end|>' }}{% endif %}{% endfor %}"""


def test_reasoning_that_the_template_cuts_off_is_trained():
    tokenizer = tokenizer_with(CUTS)
    samples = encode_messages(dialogue("a?", "<think>hm</think>A"), tokenizer)
    assert trained_texts(tokenizer, *samples) == ["<think>\nhm\n</think>\n\nA<|end|>"]


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_given_in_the_field_that_the_template_reads(field):
    tokenizer = tokenizer_with(SWITCHED)
    talk = dialogue("a?", "A")
    talk[1][field] = "hm"
    samples = encode_messages(talk, tokenizer)
    assert trained_texts(tokenizer, *samples) == ["<think>\nhm\n</think>\n\nA<|im_end|>"]


def test_reasoning_without_a_place_in_the_template_is_refused_unless_it_is_dropped():
    tokenizer = make_tokenizer()
    talk = dialogue("a?", "A")
    talk[1]["reasoning_content"] = "hm"
    with pytest.raises(ValueError, match="no place for reasoning"):
        encode_messages(talk, tokenizer)
    samples = encode_messages(talk, tokenizer, thinking="drop")
    assert trained_texts(tokenizer, *samples) == ["A<|im_end|>"]


def test_reasoning_in_a_field_is_refused_with_a_named_template_unless_it_is_dropped():
    talk = dialogue("a?", "A")
    talk[1]["reasoning_content"] = "hm"
    settings = dict(
        tokenizer=make_tokenizer(),
        max_length=512,
        dataset_map_fn=openai_map_fn,
        template_map_fn=template_map_fn_factory(PROMPT_TEMPLATE.qwen_chat),
        pack_to_max_length=False,
    )
    rows = Dataset.from_list([{"messages": talk}])
    with pytest.raises(UserError, match="reasoning_content, which the prompt template"):
        process_hf_dataset(rows, **settings)
    assert len(process_hf_dataset(rows, train_thinking="drop", **settings)) == 1


@pytest.mark.parametrize("reasoning", [None, "hm"])
def test_told_not_to_think_every_answer_follows_the_empty_thought(reasoning):
    tokenizer = tokenizer_with(SWITCHED)
    talk = dialogue("a?", "A", "b?", "B")
    for message in talk[1::2]:
        message["reasoning_content"] = reasoning
    switch = {"enable_thinking": False}
    samples = encode_messages(talk, tokenizer, template_arguments=switch)
    assert trained_texts(tokenizer, *samples) == ["A<|im_end|>", "B<|im_end|>"]
    before, sent = prompted(tokenizer, samples, talk, **switch)
    assert before == sent


def test_answers_of_a_template_that_rewrites_what_is_before_them():
    tokenizer = tokenizer_with(MOVES)
    system = {"role": "system", "content": "S"}
    talk = [system, *dialogue("a", "A", "b", "B", "c", "C")]
    samples = encode_messages(talk, tokenizer)
    assert trained_texts(tokenizer, *samples) == ["A</s>", "B</s>", "C</s>"]
    before, sent = prompted(tokenizer, samples, talk)
    assert before == sent and tokenizer.decode(sent[1]) == "[Q]a[A]A<|im_end|>[Q]S b[A]"


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
def test_no_token_spans_the_start_of_an_answer(kind):
    tokenizer = make_tokenizer(kind)
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n{", "assistant: {")
    tokenizer.chat_template = tokenizer.chat_template.replace("'] }}\n", "'] }}: ")
    talk = dialogue("Hi", "Please", "Hi", "\n\nPlease")
    before, sent = prompted(tokenizer, encode_messages(talk, tokenizer), talk)
    assert before[0] == sent[0]
    # An earlier answer is the same text, cut as it was generated.
    texts = [[tokenizer.decode(ids).replace(" ", "") for ids in side] for side in (before, sent)]
    assert texts[0] == texts[1]


def test_equal_answers_and_answers_within_questions_keep_their_places():
    tokenizer = tokenizer_with(FORGETS)
    talk = []
    for question in ("X", "assistant\nX", "<|im_end|>X"):
        talk += [{"role": "user", "content": question}, {"role": "assistant", "content": "X"}]
    texts = trained_texts(tokenizer, *encode_messages(talk, tokenizer))
    assert texts == ["X<|im_end|>", "X<|im_end|>", "<think>\n\n</think>\n\nX<|im_end|>"]


def test_an_answer_that_the_template_leaves_out_is_refused():
    tokenizer = tokenizer_with("{{ messages[-1].content }}")
    with pytest.raises(ValueError, match="does not write the answer after the prompt"):
        encode_messages(TALK, tokenizer)


def prepared(map_fn, rows, **settings):
    tokenizer = tokenizer_with(FORGETS)
    made = process_hf_dataset(
        Dataset.from_list(rows),
        tokenizer=tokenizer,
        max_length=512,
        dataset_map_fn=map_fn,
        template_map_fn=template_map_fn_factory(PROMPT_TEMPLATE.auto),
        pack_to_max_length=False,
        **settings,
    )
    return [trained_texts(tokenizer, sample) for sample in made]


@pytest.mark.parametrize("map_fn", [None, openai_map_fn, auto_map_fn])
def test_rows_of_messages_reach_the_template_whole(map_fn):
    plain = {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    }
    rows = [{"messages": TALK, "tools": json.dumps(TOOLS)}, {**plain, "tools": None}]
    texts = prepared(map_fn, rows)
    assert texts == [STEPS[:2], STEPS[2:], ["<think>\n\n</think>\n\nHo<|im_end|>"]]


@pytest.mark.parametrize(
    ("train_on", "expected"),
    [("answers", ["A<|im_end|>", "B<|im_end|>"]), ("last_answer", ["B<|im_end|>"])],
)
@pytest.mark.parametrize("template", ["auto", "qwen_chat"])
def test_which_answers_are_trained(train_on, expected, template):
    tokenizer = make_tokenizer()
    turns = [{"input": "a", "output": "A"}, {"input": "b", "output": "B"}]
    settings = dict(
        tokenizer=tokenizer,
        max_length=512,
        template_map_fn=template_map_fn_factory(PROMPT_TEMPLATE[template]),
        pack_to_max_length=False,
    )
    rows = Dataset.from_list([{"conversation": turns}])
    (sample,) = process_hf_dataset(rows, train_on=train_on, **settings)
    assert trained_texts(tokenizer, sample) == expected
    (sample,) = process_hf_dataset(rows, train_on="everything", **settings)
    assert sample["labels"] == sample["input_ids"]


def test_another_word_for_it_is_refused():
    with pytest.raises(UserError, match=r"train_on: expected .* got 'nothing'"):
        prepared(openai_map_fn, [{"messages": TALK}], train_on="nothing")


PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Four."}], "loss": None},
]


def test_content_in_parts_is_its_text_and_loss_none_is_not_given():
    tokenizer = make_tokenizer()
    (sample,) = encode_messages(PARTS, tokenizer)
    plain = [{"role": "user", "content": "ab?"}, {"role": "assistant", "content": "Four."}]
    assert [sample] == encode_messages(plain, tokenizer)
    assert trained_texts(tokenizer, sample) == ["Four.<|im_end|>"]


def test_a_call_without_arguments_has_none():
    tokenizer = tokenizer_with(FORGETS)
    call = {"type": "function", "function": {"name": "now"}}
    messages = [TALK[0], {"role": "assistant", "content": None, "tool_calls": [call]}, *TALK[2:4]]
    texts = trained_texts(tokenizer, *encode_messages(messages, tokenizer, tools=TOOLS))
    assert '{"name": "now", "arguments": {}}' in texts[0]


@pytest.mark.parametrize("first", [[], [{"role": "system", "content": "S"}]])
def test_an_answer_before_any_question_is_named_unless_it_is_not_trained(first):
    tokenizer = make_tokenizer()
    hello = {"role": "assistant", "content": "Hello"}
    talk = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(ValueError, match="begins with an answer"):
        encode_messages([*first, hello, *talk], tokenizer)
    (sample,) = encode_messages([*first, {**hello, "loss": False}, *talk], tokenizer)
    assert trained_texts(tokenizer, sample) == ["a<|im_end|>"]


def test_tokens_of_whitespace_keep_their_loss_where_offsets_are_trimmed():
    tokenizer = make_tokenizer()
    answer = "  x = 1\n    return x\n\n   y  "
    talk = [{"role": "user", "content": "a  "}, {"role": "assistant", "content": answer}]
    kept = encode_messages(talk, tokenizer)
    trimming = tokenizer_with(tokenizer.chat_template)
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    offsets = trimming(answer, return_offsets_mapping=True)["offset_mapping"]
    assert any(first == last for first, last in offsets)
    assert encode_messages(talk, trimming) == kept
    assert answer in trained_texts(tokenizer, *kept)[0]


def test_a_template_that_does_not_end_is_refused_in_training(monkeypatch):
    monkeypatch.setattr("xtuner.tokenization.rendering.TEMPLATE_SECONDS", 0.2)
    loop = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    with pytest.raises(UserError, match="does not end"):
        encode_messages(messages, make_tokenizer(chat_template=loop))


def test_a_tokenizer_without_a_chat_template_is_named():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"^the tokenizer has no chat template\n"):
        rendered(tokenizer, [{"role": "user", "content": "a"}])
    rows = Dataset.from_list([{"messages": [{"role": "user", "content": "a"}] * 2}])
    with pytest.raises(UserError, match=r"^the tokenizer has no chat template\n"):
        process_hf_dataset(
            rows,
            tokenizer=tokenizer,
            max_length=64,
            dataset_map_fn=openai_map_fn,
            template_map_fn=template_map_fn_factory(template=PROMPT_TEMPLATE.auto),
        )
    tokenizer.chat_template = "{{ raise_exception('not so') }}"
    with pytest.raises(Exception, match="not so") as refused:  # it is the row's fault
        rendered(tokenizer, [{"role": "user", "content": "a"}])
    assert not isinstance(refused.value, UserError)
