"""A published prompt template as a Jinja chat template, so that others build the same prompt.

transformers, vLLM, LMDeploy and Ollama render messages with the Jinja template of the tokenizer.
What ``to_jinja`` writes gives, for messages, the text that training made of the conversation: the
system text before the question that follows it, the number of the round, the suffix, eos and
separator after each answer, and bos where a sample begins and after each eos.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from xtuner.tokenization.rendering import rendered
from xtuner.utils.types import Tokenizer

if TYPE_CHECKING:
    from transformers import GenerationConfig

_FIELD = re.compile(r"\{(system|input|round|bot_name)\}")


def to_jinja(
    template: Mapping[str, Any], *, with_bos: bool, bot_name: str = "BOT", prefix: str = ""
) -> str:
    """Translate an entry of ``PROMPT_TEMPLATE``.

    Args:
        template: its fields SYSTEM, INSTRUCTION, SUFFIX, SUFFIX_AS_EOS, SEP.
        with_bos: whether training puts the bos token in front.
        bot_name: what a ``{bot_name}`` in the template stands for.
        prefix: what training puts in front where the tokenizer has no bos token.

    Returns:
        The Jinja text. A trailing user message always ends with the beginning of the answer, as
        in training; ``add_generation_prompt`` changes nothing.
    """
    names = {"bot_name": json.dumps(bot_name, ensure_ascii=False), "round": "state.round"}
    system = _expression(template.get("SYSTEM", ""), names | {"system": "state.system"})
    question = _expression(template["INSTRUCTION"], names | {"input": "message['content']"})
    ends_in_eos = not template.get("SUFFIX_AS_EOS", False)
    answer = ["message['content']", _quoted(template.get("SUFFIX", ""))]
    answer += ["eos_token"] if ends_in_eos else []
    answer += [_quoted(template.get("SEP", ""))]
    bos_again = "true" if ends_in_eos else "false"
    lines = [
        "{%- set state = namespace(round=0, system='', bos=true) -%}",
        "{%- for message in messages -%}",
        "{%- if message['role'] == 'system' -%}",
        "{%- set state.system = message['content'] -%}",
        "{%- elif message['role'] == 'assistant' -%}",
        f"{{{{- {_sum(answer)} -}}}}",
        f"{{%- set state.bos = {bos_again} -%}}",
        "{%- else -%}",
        "{%- set state.round = state.round + 1 -%}",
    ]
    start = "bos_token" if with_bos else _quoted(prefix)
    if start:
        lines += ["{%- if state.bos -%}", f"{{{{- {start} -}}}}", "{%- endif -%}"]
    lines += [
        "{%- set state.bos = false -%}",
        "{%- if state.system -%}",
        f"{{{{- {system} -}}}}" if system else "",
        "{%- endif -%}",
        "{%- set state.system = '' -%}",
        f"{{{{- {question} -}}}}",
        "{%- endif -%}",
        "{%- endfor -%}",
    ]
    return "".join(line for line in lines if line)


def with_arguments(template: str, arguments: Mapping[str, Any]) -> str:
    """A chat template whose variables have values where a caller gives none.

    Args:
        template: a Jinja chat template.
        arguments: names and values, such as ``dict(enable_thinking=False)``.
    """
    lines = [
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}"
        for name, value in arguments.items()
    ]
    prefix = "".join([*lines, "{{- '' }}"])
    return template if not lines or template.startswith(prefix) else prefix + template


def _literal(value: object) -> str:
    """A plain value as a Jinja expression."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_literal(k)}: {_literal(v)}' for k, v in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_literal, value))}]"
    return json.dumps(value, ensure_ascii=False)


def set_arguments(tokenizer: Tokenizer, arguments: Mapping[str, Any]) -> None:
    """Give the variables of a tokenizer's chat template (or templates) values, in place."""
    own = tokenizer.chat_template
    if isinstance(own, Mapping):
        tokenizer.chat_template = {k: with_arguments(v, arguments) for k, v in own.items()}
    elif own:
        tokenizer.chat_template = with_arguments(own, arguments)


def render_question(
    template: Mapping[str, Any], question: str, round: int, system: str = "", bot_name: str = "BOT"
) -> str:
    """The text that training puts before the answer of a turn.

    Args:
        template: an entry of ``PROMPT_TEMPLATE``.
        question: the user's text; braces in it are only text.
        round: the number of the turn, from 1.
        system: the system text that goes with this turn, if any.
        bot_name: what a ``{bot_name}`` in the template stands for.
    """
    values = {"input": question, "round": str(round), "system": system, "bot_name": bot_name}
    text = (template.get("SYSTEM", "") if system else "") + template["INSTRUCTION"]
    return _FIELD.sub(lambda match: values[match[1]], text)


def stop_words(template: Mapping[str, Any], eos_token: str | None) -> list[str]:
    """The texts at which generation has to stop for a model trained with ``template``."""
    words = list(template.get("STOP_WORDS", []))
    suffix = template.get("SUFFIX", "").strip()
    if suffix:
        words.append(suffix)
    if eos_token:
        words.append(eos_token)
    return list(dict.fromkeys(words))


def single_token(tokenizer: Tokenizer, text: str) -> int | None:
    """The id of a text that is one token of the vocabulary, else None."""
    if text and text == tokenizer.eos_token and tokenizer.eos_token_id is not None:
        return int(tokenizer.eos_token_id)  # even if it is not found in a text
    ids = tokenizer.encode(text, add_special_tokens=False)
    return int(ids[0]) if len(ids) == 1 else None


def stop_ids(tokenizer: Tokenizer, words: list[str]) -> list[int]:
    """The ids of those stop words that are one token, without repetition."""
    found = [single_token(tokenizer, word) for word in words]
    return list(dict.fromkeys(number for number in found if number is not None))


def turn_end_ids(tokenizer: Tokenizer) -> list[int]:
    """The special token that the tokenizer's chat template writes after an answer, if there is one.

    It is often not the tokenizer's eos: base models of the Qwen2.5 kind end texts with
    ``<|endoftext|>`` and turns with ``<|im_end|>``.
    """
    answer = "XTunerAnswer"
    turns = [("user", "Hi"), ("assistant", answer), ("user", "Bye")]
    messages = [{"role": role, "content": text} for role, text in turns]
    try:
        text = rendered(tokenizer, messages)
    except Exception:  # no template, or one that wants other messages: it says nothing
        return []
    after = text.partition(answer)[2].lstrip()
    ids = tokenizer.encode(after, add_special_tokens=False)[:1]
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return [number for number in ids if number in special]


def answer_stops(
    tokenizer: Tokenizer,
    template: Mapping[str, Any] | None = None,
    generation_config: GenerationConfig | None = None,
    extra: Sequence[str] = (),
) -> tuple[list[int], list[str]]:
    """What ends an answer: template, tokenizer, the model's generation config, and ``extra``.

    Args:
        tokenizer: of the model.
        template: an entry of ``PROMPT_TEMPLATE``; None for the tokenizer's own chat template.
        generation_config: of the model, whose ``eos_token_id`` may have several ids.
        extra: further texts.

    Returns:
        The ids, and the texts that are not a single token.
    """
    ends = [tokenizer.eos_token] if tokenizer.eos_token else []
    words = [*extra, *(stop_words(template, tokenizer.eos_token) if template else ends)]
    found = {word: single_token(tokenizer, word) for word in words}
    ids = [number for number in found.values() if number is not None]
    if not template:
        ids += turn_end_ids(tokenizer)
    of_model = getattr(generation_config, "eos_token_id", None)
    of_model = [of_model] if isinstance(of_model, int) else list(of_model or ())
    texts = [word for word, number in found.items() if number is None]
    return list(dict.fromkeys([*ids, *of_model])), texts


def _expression(text: str, fields: Mapping[str, str]) -> str:
    """A Jinja expression for a text with fields in braces."""
    segments = _FIELD.split(text)
    terms = [
        fields[piece] + ("|string" if piece == "round" else "") if index % 2 else _quoted(piece)
        for index, piece in enumerate(segments)
    ]
    return _sum(terms)


def _sum(terms: list[str]) -> str:
    return " + ".join(term for term in terms if term)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""
