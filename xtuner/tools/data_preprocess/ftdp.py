"""``xtuner preprocess ftdp``: FTDP chat files (a list of messages a line) to tokens on disk.

For each file there are two: ``.bin`` with one JSON object ``{"tokens": [...]}`` a line, in which
tokens without loss are negative, and ``.bin.meta``, a NumPy array of each line's byte offset and
number of tokens. ``load_intern_repo_tokenized_dataset`` and ``build_packed_dataset`` read them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from xtuner.tools.arguments import add_trust_remote_code
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr
from xtuner.utils.types import Tokenizer

SPECIAL = (
    "<|im_start|>",
    "<|im_end|>",
    "<|action_start|>",
    "<|action_end|>",
    "<|interpreter|>",
    "<|plugin|>",
)
TRAINED_ROLE = "assistant"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("--processed-dir", required=True, help=tr("chat files"))
    parser.add_argument("--tokenized-dir", required=True, help=tr("to write"))
    parser.add_argument("--tokenizer-path", required=True, help=tr("tokenizer"))
    parser.add_argument(
        "--tokenizer-w-special-tokens-save-dir",
        metavar="FOLDER",
        help=tr("save the tokenizer with the chat's special tokens here"),
    )
    add_trust_remote_code(parser)


def run(args: argparse.Namespace) -> int:
    """Tokenize every file.

    Returns:
        0.
    """
    from xtuner.dataset.data_order import find_by_suffix
    from xtuner.model.remote_code import load_pretrained
    from xtuner.model.transformers_models.auto import AutoTokenizer

    source, target = Path(args.processed_dir), Path(args.tokenized_dir)
    files = find_by_suffix(source, ".jsonl")
    tokenizer: Any = load_pretrained(
        AutoTokenizer, args.tokenizer_path, trusted=args.trust_remote_code
    )
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([word for word in SPECIAL if word not in known], special_tokens=True)
    if args.tokenizer_w_special_tokens_save_dir:
        tokenizer.save_pretrained(args.tokenizer_w_special_tokens_save_dir)
    for file in files:
        out = target / file.relative_to(source).with_suffix(".bin")
        rows, tokens = tokenize_file(file, out, tokenizer)
        print(tr("{out}: {rows:,} rows, {tokens:,} tokens", out=out, rows=rows, tokens=tokens))
    return 0


def tokenize_file(file: Path, out: Path, tokenizer: Tokenizer) -> tuple[int, int]:
    """Write ``out`` and its ``.meta``; gives the numbers of rows and of tokens.

    Raises:
        UserError: for a line that is no list of messages.
    """
    import numpy as np

    from xtuner.dataset.reading import require_rows
    from xtuner.utils.files import written_aside

    offsets: list[tuple[int, int]] = []
    with written_aside(out) as aside, aside.open("wb") as stream:
        for row in require_rows(str(file), lines=True):
            tokens = _tokens(row.value, tokenizer, Where(row.file, row.line))
            offsets.append((stream.tell(), len(tokens)))
            stream.write(json.dumps({"tokens": tokens}).encode() + b"\n")
    with written_aside(f"{out}.meta") as aside, aside.open("wb") as stream:
        np.save(stream, np.array(offsets, dtype=np.int64).reshape(-1, 2))
    return len(offsets), sum(count for _, count in offsets)


def _tokens(messages: object, tokenizer: Tokenizer, where: Where) -> list[int]:
    if not isinstance(messages, list) or not all(_is_message(one) for one in messages):
        raise UserError(
            tr("this line is no list of messages {role, content}"),
            where=where,
        )
    return encode(
        messages,
        lambda text: tokenizer.encode(text, add_special_tokens=False),
        tokenizer.bos_token_id,
    )


def _is_message(value: object) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("role"), str)
        and isinstance(value.get("content"), str)
    )


def encode(
    messages: Iterable[dict[str, str]], ids_of: Callable[[str], list[int]], bos: int | None
) -> list[int]:
    """Ids of a conversation; those without loss are negative (id 0 cannot be).

    Trained are the assistant's contents and the ``<|im_end|>`` after each.
    """
    tokens = [] if bos is None else [-bos]
    for message in messages:
        name = f" name={message['name']}" if message.get("name") else ""
        head = ids_of(f"<|im_start|>{message['role']}{name}\n")
        body = ids_of(message["content"]) + ids_of("<|im_end|>")
        tokens += [-token for token in head]
        tokens += body if message["role"] == TRAINED_ROLE else [-token for token in body]
        tokens += [-token for token in ids_of("\n")]
    return tokens
