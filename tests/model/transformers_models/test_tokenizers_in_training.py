"""Training, chat and the converted folder's chat template give the same ids in hub families."""

from __future__ import annotations

import pytest

from tests.helpers.hub_layouts import write_tokenizer
from xtuner.chat.prompt import ChatPrompt, Turn
from xtuner.engine.hooks import EvaluateChatHook
from xtuner.export.sidecar_files import write_tokenizer as export_tokenizer
from xtuner.model.transformers_models.auto import AutoTokenizer
from xtuner.proving.templates import PROBES, compare, trained_ids
from xtuner.tokenization.encode import encode_conversation
from xtuner.tokenization.segments import SegmentEncoder
from xtuner.utils.templates import PROMPT_TEMPLATE

# A family's template and keyword arguments of its published configs.
TRAINED = {
    "internlm": ("internlm_chat", {}),
    "internlm2": ("internlm2_chat", {}),
    "internvl": ("internlm2_chat", {}),
    "baichuan": ("baichuan_chat", {}),
    "baichuan2": ("baichuan2_chat", {}),
    "chatglm2": ("chatglm2", {}),
    "chatglm3": ("chatglm3", {"encode_special_tokens": True}),
    "qwen": ("qwen_chat", {"eos_token": "<|im_end|>"}),
}
SENTENCES = ["Sophia, a philosopher: sop", "你好</s>世界", "x  y\n\tz", "</s> a", "<|user|>", "é👍"]


@pytest.fixture(params=TRAINED)
def family(request, tmp_path):
    template, settings = TRAINED[request.param]
    write_tokenizer(tmp_path / "hub", request.param)
    (tmp_path / "converted").mkdir()
    tokenizer = AutoTokenizer.from_pretrained(
        tmp_path / "hub", padding_side="right", trust_remote_code=True, **settings
    )
    return tokenizer, PROMPT_TEMPLATE[template], tmp_path


def test_the_converted_folder_builds_the_prompts_of_training(family):
    tokenizer, template, folder = family
    before = [trained_ids(tokenizer, template, probe) for probe in PROBES]

    export_tokenizer(folder / "converted", tokenizer, template)

    reloaded = AutoTokenizer.from_pretrained(folder / "converted")
    for each in (tokenizer, reloaded):
        assert compare(each, template) == []
        assert [trained_ids(each, template, probe) for probe in PROBES] == before


def test_texts_keep_their_ids_in_the_converted_folder(family):
    tokenizer, template, folder = family
    plain = [text for text in SENTENCES if "</s>" not in text]
    before = [tokenizer.encode(text) for text in plain]
    export_tokenizer(folder / "converted", tokenizer, template)
    reloaded = AutoTokenizer.from_pretrained(folder / "converted")
    assert [reloaded.encode(text) for text in plain] == before


def test_bos_and_eos_are_single_ids_after_any_text(family):
    tokenizer, _, _ = family
    prefix = tokenizer.encode("", add_special_tokens=True)
    if tokenizer.bos_token_id is not None:
        prefix = [tokenizer.bos_token_id]
    for text in SENTENCES:
        turns = [{"input": text, "output": text}] * 2
        sample = encode_conversation(turns, tokenizer)
        ids, labels = sample["input_ids"], sample["labels"]
        question = tokenizer.encode(text, add_special_tokens=False)
        if prefix or tokenizer.is_fast is False:
            assert ids[: len(prefix) + len(question)] == prefix + question
        assert ids[-1] == labels[-1] == tokenizer.eos_token_id
        assert ids[: len(ids) // 2] == ids[len(ids) // 2 :]


def test_many_texts_at_once_have_the_ids_of_one(family):
    tokenizer, _, _ = family
    one = SegmentEncoder(tokenizer)
    texts = [[one.bos, text, other, one.eos, "\n"] for text in SENTENCES for other in SENTENCES]
    texts = [[piece for piece in segments if piece] for segments in texts]
    texts += [[" ".join(SENTENCES) * 20]]
    many = SegmentEncoder(tokenizer)
    assert many(texts) == [one([segments])[0] for segments in texts]
    assert many(texts) == [SegmentEncoder(tokenizer)([segments])[0] for segments in texts]


def test_chat_and_sample_answers_ask_as_training_does(family):
    tokenizer, template, _ = family
    mapped = trained_ids(tokenizer, template, ("", [("What is 1 + 1?", "2")]))
    asked = ChatPrompt(tokenizer, template).ids([Turn("What is 1 + 1?")])
    assert mapped[: len(asked)] == asked
    hook = EvaluateChatHook(tokenizer, ["What is 1 + 1?"], prompt_template=template)
    assert hook.prompt("What is 1 + 1?") == asked
