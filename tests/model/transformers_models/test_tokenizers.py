"""Tokenizers of families whose hub folders bring tokenizer code: the hub's ids, without that code.

``tests/golden/hub_tokenizers/ids.json`` holds the ids that the hub's own code gives (transformers
4.41.2, sentencepiece 0.1.99, tiktoken 0.14) on vocabularies made by ``tests.helpers.hub_layouts``.
The Python files of the folders here raise when they are run.
"""

from __future__ import annotations

import copy
import json
import pickle
import random
import shutil
from pathlib import Path

import pytest
from tokenizers import AddedToken

from tests.helpers.hub_layouts import LAYOUTS, USER_DEFINED, write_tokenizer
from xtuner.model.transformers_models.auto import AutoTokenizer
from xtuner.model.transformers_models.tokenizers.conversion import from_sentencepiece
from xtuner.utils.errors import UserError

GOLDEN = Path(__file__).parents[2] / "golden" / "hub_tokenizers"
PUBLISHED = json.loads((GOLDEN / "ids.json").read_text("utf-8"))
TEXTS: list[str] = PUBLISHED["texts"]
OURS = [family for family, layout in LAYOUTS.items() if layout.modules]


def golden_folder(folder: Path, name: str) -> Path:
    """A folder with the very vocabulary that the published ids were made with."""
    expected = PUBLISHED["tokenizers"][name]
    family = expected["family"]
    write_tokenizer(folder, family)
    shutil.copy(GOLDEN / expected["vocabulary"], folder / LAYOUTS[family].vocab_file)
    return folder


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}], ids=["plain", "trust"])
@pytest.mark.parametrize("name", PUBLISHED["tokenizers"])
def test_ids_are_those_of_the_hubs_code(tmp_path, name, trust):
    expected = PUBLISHED["tokenizers"][name]
    folder = golden_folder(tmp_path, name)

    tokenizer = AutoTokenizer.from_pretrained(folder, **expected["settings"], **trust)

    assert type(tokenizer).__name__ == LAYOUTS[expected["family"]].tokenizer_class
    for text, ids in zip(TEXTS, expected["ids"], strict=True):
        assert tokenizer.encode(text, add_special_tokens=False) == ids, repr(text)
        assert tokenizer.encode(text) == expected["prefix"] + ids, repr(text)
    assert len(tokenizer) == max(
        expected["size"], write_tokenizer(tmp_path / "x", expected["family"])
    )


@pytest.mark.parametrize("family", [*LAYOUTS])
def test_the_number_of_ids_fits_a_model(tmp_path, family):
    ids = write_tokenizer(tmp_path, family)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == ids
    assert max(tokenizer.get_vocab().values()) == ids - 1


@pytest.mark.parametrize("family", ["internlm", "internvl"])
def test_converted_sentencepiece_gives_sentencepieces_ids(tmp_path, family):
    import sentencepiece

    write_tokenizer(tmp_path, family)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    draw = random.Random(0)
    parts = [
        *"ab  \t\n（他。的é\u3000=-.|",
        "▁",
        "——",
        "the",
        "return",
        "他们",
        "😀",
        "<0x0A>",
        "<eoh>",
    ]
    for _ in range(500):
        text = "".join(draw.choices(parts, k=draw.randint(1, 30)))
        assert tokenizer.encode(text, add_special_tokens=False) == reference.encode(text), repr(
            text
        )


@pytest.mark.parametrize("family", OURS)
def test_a_saved_folder_is_the_hubs_folder(tmp_path, family):
    source, target, again = tmp_path / "hub", tmp_path / "saved", tmp_path / "again"
    write_tokenizer(source, family)
    tokenizer = AutoTokenizer.from_pretrained(source)

    tokenizer.save_pretrained(target)
    AutoTokenizer.from_pretrained(target).save_pretrained(again)

    for folder in (target, again):
        written = {file.name: file.read_bytes() for file in folder.iterdir()}
        written.pop("chat_template.jinja", None)  # transformers 5 writes the template twice
        assert written == {file.name: file.read_bytes() for file in source.iterdir()}
    reloaded = AutoTokenizer.from_pretrained(again)
    assert [reloaded.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.parametrize("family", ["internlm2", "baichuan2", "chatglm3", "qwen"])
def test_changes_are_saved_and_the_rest_stays(tmp_path, family):
    source, target = tmp_path / "hub", tmp_path / "saved"
    write_tokenizer(source, family)
    names = {} if family == "chatglm3" else {"eos_token": "<|im_end|>"}
    tokenizer = AutoTokenizer.from_pretrained(source, **names)
    before = json.loads((source / "tokenizer_config.json").read_text("utf-8"))
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    if family != "qwen":  # its code takes no further tokens
        tokenizer.add_tokens([AddedToken("<tool>", special=True, normalized=False)])

    tokenizer.save_pretrained(target)

    after = json.loads((target / "tokenizer_config.json").read_text("utf-8"))
    added = after.pop("added_tokens_decoder", {})
    assert after == {
        **{key: value for key, value in before.items() if key != "added_tokens_decoder"},
        "chat_template": "{{ messages[0]['content'] }}",
        **names,
    }
    reloaded = AutoTokenizer.from_pretrained(target)
    assert reloaded.chat_template == tokenizer.chat_template
    assert reloaded.eos_token_id == tokenizer.eos_token_id
    for text in (*TEXTS, "x<tool>y", "x<|im_end|>y"):
        assert reloaded.encode(text) == tokenizer.encode(text), repr(text)
    if family != "qwen":
        assert {**added}[str(tokenizer.convert_tokens_to_ids("<tool>"))]["content"] == "<tool>"


@pytest.mark.parametrize("family", OURS)
def test_copies_and_other_processes_have_the_same_ids(tmp_path, family):
    write_tokenizer(tmp_path, family)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for other in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert [other.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


@pytest.mark.parametrize("family", OURS)
def test_text_comes_back(tmp_path, family):
    write_tokenizer(tmp_path, family)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("Hello, world", "请问  你好\n\tdef f(x):", "é😀龘"):
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_a_tokenizer_json_is_read_where_the_hubs_class_reads_it(tmp_path):
    write_tokenizer(tmp_path / "a", "internlm2")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    changed = json.loads(tokenizer.backend_tokenizer.to_str())
    changed["normalizer"] = {"type": "Lowercase"}
    for family, folder in (("internlm2", "a"), ("internvl", "b")):
        write_tokenizer(tmp_path / folder, family)
        (tmp_path / folder / "tokenizer.json").write_text(json.dumps(changed), "utf-8")
    fast = AutoTokenizer.from_pretrained(tmp_path / "a")
    slow = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert fast.encode("THE") == fast.encode("the")
    assert slow.encode("THE") != slow.encode("the")
    fast.save_pretrained(tmp_path / "c")
    assert json.loads((tmp_path / "c" / "tokenizer.json").read_text("utf-8"))["normalizer"]


def test_chatglm_pads_with_places(tmp_path):
    write_tokenizer(tmp_path, "chatglm3")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    short, long = tokenizer(["a", "hello world"], padding=True)["position_ids"]
    size = len(tokenizer.encode("a"))
    assert short == [0] * (len(long) - size) + list(range(size))
    assert long == list(range(len(long)))
    prefix = tokenizer.convert_ids_to_tokens(tokenizer.encode("a"))[:2]
    assert prefix == ["[gMASK]", "sop"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda proto: proto.pieces.add(piece="▁a|b", score=0.0, type=USER_DEFINED), "with spaces"),
        (lambda proto: setattr(proto.normalizer_spec, "remove_extra_whitespaces", True), "normal"),
        (lambda proto: setattr(proto.trainer_spec, "model_type", 1), "byte fallback"),
        (lambda proto: setattr(proto.pieces[600], "type", 5), "unused"),
    ],
)
def test_what_has_no_equal_ids_is_refused(tmp_path, change, reason):
    from sentencepiece import sentencepiece_model_pb2

    write_tokenizer(tmp_path, "internlm")
    file = tmp_path / "tokenizer.model"
    proto = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    change(proto)
    file.write_bytes(proto.SerializeToString())
    with pytest.raises(UserError, match=reason) as error:
        from_sentencepiece(file, split_symbols=True)
    assert str(file) in str(error.value.where)


@pytest.mark.parametrize(("first", "refused"), [("cb", True), ("bc", False)])
def test_pieces_of_one_score_that_overlap(tmp_path, first, refused):
    """Of "cb" and "bc" SentencePiece merges the left one of a text, whichever it is."""
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    write_tokenizer(tmp_path, "internlm")
    file = tmp_path / "tokenizer.model"
    proto = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    for piece in (first, "ax" if not refused else "bc", *"~`"):
        proto.pieces.add(piece=piece, score=9.0, type=1)
    file.write_bytes(proto.SerializeToString())
    if refused:
        with pytest.raises(UserError, match="overlap"):
            from_sentencepiece(file, split_symbols=True)
        return
    backend = from_sentencepiece(file, split_symbols=True)
    reference = SentencePieceProcessor(str(file))
    for text in ("abcbcb", "cbcbc", "axbcaxx"):
        assert backend.encode(text).ids == reference.encode(text)


def test_added_tokens_after_a_gap_are_refused(tmp_path):
    write_tokenizer(tmp_path, "internvl")
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text("utf-8"))
    del config["added_tokens_decoder"]["654"]
    file.write_text(json.dumps(config), "utf-8")
    with pytest.raises(UserError, match="655"):
        AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["internlm2", "qwen", "baichuan"])
def test_a_folder_without_vocabulary_is_refused(tmp_path, family):
    write_tokenizer(tmp_path, family)
    (tmp_path / LAYOUTS[family].vocab_file).unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.model"):
        AutoTokenizer.from_pretrained(tmp_path)
