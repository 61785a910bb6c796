"""Tokenizers of families whose hub folders bring tokenizer code: the hub's ids, without that code.

``tests/golden/hub_tokenizers/ids.json`` holds the ids that the hub's own code gives (transformers
4.41.2, sentencepiece 0.1.99, tiktoken 0.14) on vocabularies made by ``tests.helpers.hub_layouts``.
The Python files of the folders here raise when they are run.
"""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest

from tests.helpers.hub_layouts import LAYOUTS, write_tokenizer
from xtuner.model.transformers_models.auto import AutoTokenizer

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
