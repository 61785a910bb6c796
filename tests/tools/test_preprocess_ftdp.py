"""``xtuner preprocess ftdp``: tokens on disk that come back as the conversation they were."""

from __future__ import annotations

import json

import numpy as np

from xtuner.entry_point import main

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name a river."},
    {"role": "assistant", "content": "The Rhine."},
]


def test_tokens_and_offsets(tmp_path, tiny_llama, tokenizer, capsys):
    source, target = tmp_path / "in" / "part", tmp_path / "out"
    source.mkdir(parents=True)
    (source / "a.jsonl").write_text(json.dumps(CHAT) + "\n" + json.dumps(CHAT[1:]) + "\n")
    saved = tmp_path / "tokenizer"
    words = ["--processed-dir", str(tmp_path / "in"), "--tokenized-dir", str(target)]
    words += ["--tokenizer-path", str(tiny_llama)]
    assert main(["preprocess", "ftdp", *words,
                 "--tokenizer-w-special-tokens-save-dir", str(saved)]) == 0  # fmt: skip
    content = (target / "part" / "a.bin").read_bytes()
    meta = np.load(target / "part" / "a.bin.meta")
    assert len(meta) == 2
    for (offset, count), chat in zip(meta, (CHAT, CHAT[1:]), strict=True):
        tokens = json.loads(content[offset:].split(b"\n")[0])["tokens"]
        assert len(tokens) == count
        said = "".join(f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in chat)
        assert tokenizer.decode([abs(token) for token in tokens]) == "<s>" + said
        trained = [token for token in tokens[1:] if token > 0]
        assert tokenizer.decode(trained) == "The Rhine.<|im_end|>"
    assert (saved / "tokenizer.json").is_file()


def test_a_line_that_is_no_chat_is_named(tmp_path, tiny_llama, capsys):
    (tmp_path / "a.jsonl").write_text(json.dumps(CHAT) + '\n{"text": "a"}\n')
    words = ["--processed-dir", str(tmp_path), "--tokenized-dir", str(tmp_path / "out")]
    assert main(["preprocess", "ftdp", *words, "--tokenizer-path", str(tiny_llama)]) == 1
    assert "a.jsonl:2: this line is no list of messages" in capsys.readouterr().err
    assert not (tmp_path / "out" / "a.bin").exists()
