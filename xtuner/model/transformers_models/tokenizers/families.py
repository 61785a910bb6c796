"""The tokenizers of InternLM, Baichuan, ChatGLM, Orion, Yi and Qwen, under the hub's class names.

The ids are those of the hub's own code. The vocabularies of InternLM 1 to 3 and Qwen have fast
tokenizers with the same ids; Baichuan, ChatGLM, Orion and Yi use SentencePiece itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizer, TokenizersBackend
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from xtuner.model.transformers_models.tokenizers.conversion import from_ranks, from_sentencepiece
from xtuner.model.transformers_models.tokenizers.hub_files import HubFiles
from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr

TOKENIZER_FILE = "tokenizer.json"


class _Fast(HubFiles, TokenizersBackend):
    """A fast tokenizer: of ``tokenizer.json`` where the folder has one, else of its vocabulary."""

    padding_side = "right"
    vocab_file: str | None = None
    slow_reads_json = False

    def __init__(
        self, vocab_file: str | None = None, tokenizer_file: str | None = None, **kwargs: Any
    ) -> None:
        settings = self.named_tokens | kwargs
        reads_json = self.slow_reads_json or has_fast_class(settings)
        if vocab_file is not None and not reads_json:
            tokenizer_file = None  # the hub's slow class does not read it
        if tokenizer_file is None:
            self._tokenizer = self.convert_vocabulary(_required(vocab_file), settings)
        self._from_json = tokenizer_file is not None
        super().__init__(vocab_file=vocab_file, tokenizer_file=tokenizer_file, **settings)

    @classmethod
    def convert_to_native_format(
        cls, trust_remote_code: bool = False, **kwargs: object
    ) -> dict[str, Any]:
        """Leave the files to the constructor."""
        return kwargs

    @classmethod
    def convert_vocabulary(cls, vocab_file: str, settings: dict[str, Any]) -> Any:
        """The backend with the ids of a vocabulary file.

        Args:
            vocab_file: its path.
            settings: arguments of the constructor; defaults of the family are added.
        """
        raise NotImplementedError

    def _save_pretrained(
        self, save_directory: Any, file_names: tuple[str, ...], *args: Any, **kwargs: Any
    ) -> tuple[str, ...]:
        if self._from_json:
            file_names = super()._save_pretrained(save_directory, file_names, *args, **kwargs)
        return file_names + (self.save_vocabulary(save_directory) if self.vocab_file else ())

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str]:
        """Copy the vocabulary file into a folder."""
        name = f"{filename_prefix}-" if filename_prefix else ""
        target = Path(save_directory) / (name + self.vocab_files_names["vocab_file"])
        source = Path(_required(self.vocab_file))
        if source.resolve() != target.resolve():
            target.write_bytes(source.read_bytes())
        return (str(target),)


class InternLM2Tokenizer(_Fast):
    """InternLM2, InternLM2.5 and InternVL with one of them."""

    vocab_files_names = {"vocab_file": "tokenizer.model", "tokenizer_file": TOKENIZER_FILE}
    named_tokens = {
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
    }

    @classmethod
    def convert_vocabulary(cls, vocab_file: str, settings: dict[str, Any]) -> Any:
        has_fast = has_fast_class(settings)
        settings.setdefault("add_bos_token", True)
        settings.setdefault("padding_side", "left" if has_fast else "right")
        renamed = settings.get("added_tokens_decoder") or {}
        names = {int(number): str(token) for number, token in renamed.items()}
        # the hub's fast class, where the folder has it, knows no user-defined pieces
        return from_sentencepiece(vocab_file, names, split_symbols=not has_fast)


class InternLMTokenizer(InternLM2Tokenizer):
    """InternLM."""


class InternLM3Tokenizer(InternLM2Tokenizer):
    """InternLM3."""


class LlamaTokenizer(_Fast):
    """Llama, Vicuna, Yi, MiniCPM and others: as ``tokenizer.json`` says, or SentencePiece.

    transformers' class of this name builds a tokenizer of its own from the vocabulary: it drops a
    space at the beginning of a text, and takes text after a special token for that of a new word.
    """

    padding_side = "left"
    slow_reads_json = True
    vocab_files_names = {"vocab_file": "tokenizer.model", "tokenizer_file": TOKENIZER_FILE}
    named_tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}

    def __init__(
        self, vocab_file: str | None = None, tokenizer_file: str | None = None, **kwargs: Any
    ) -> None:
        if tokenizer_file is None or "add_eos_token" in kwargs:
            kwargs.setdefault("add_bos_token", True)
        super().__init__(vocab_file, tokenizer_file, **kwargs)

    @classmethod
    def convert_vocabulary(cls, vocab_file: str, settings: dict[str, Any]) -> Any:
        return from_sentencepiece(vocab_file, split_symbols=True)


LlamaTokenizerFast = LlamaTokenizer


class QWenTokenizer(_Fast):
    """Qwen 1: ``qwen.tiktoken``, followed by the special tokens that its code names."""

    vocab_files_names = {"vocab_file": "qwen.tiktoken", "tokenizer_file": TOKENIZER_FILE}
    PATTERN = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    SPECIAL = (
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        *(f"<|extra_{number}|>" for number in range(205)),
    )
    code_tokens = SPECIAL

    @classmethod
    def convert_vocabulary(cls, vocab_file: str, settings: dict[str, Any]) -> Any:
        for name in cls.SPECIAL_TOKENS_ATTRIBUTES:
            if isinstance(settings.get(name), str):  # with the flags of the backend's
                settings[name] = AddedToken(settings[name], special=True, normalized=True)
        return from_ranks(vocab_file, cls.PATTERN, cls.SPECIAL)


class BaichuanTokenizer(HubFiles, SentencePieceBackend):
    """Baichuan and Baichuan2."""

    named_tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}

    def __init__(
        self,
        vocab_file: str | None = None,
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        **kwargs: Any,
    ) -> None:
        ends = [name for name, has in (("bos", add_bos_token), ("eos", add_eos_token)) if has]
        super().__init__(
            vocab_file=_required(vocab_file),
            special_tokens_pattern="_".join(ends) or "none",
            add_bos_token=add_bos_token,
            add_eos_token=add_eos_token,
            **self.named_tokens | kwargs,
        )
        for token in self._special_tokens_map.values():
            if isinstance(token, AddedToken):  # with its flags, which transformers has dropped
                self._added_tokens_decoder[self._added_tokens_encoder[str(token)]] = token

    def mark_template_tokens(self) -> None:
        """Find special tokens in a text also between words, as a chat template needs.

        The flag ``single_word`` of Baichuan2's tokens makes them text unless spaces surround them.
        """
        for number, token in self._added_tokens_decoder.items():
            if token.single_word:
                plain = AddedToken(token.content, special=True, normalized=False)
                self._added_tokens_decoder[number] = plain

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text of tokens; special tokens stand in it as they are."""
        return _joined(self.sp_model, tokens, set(self.all_special_tokens))


class BaiChuanTokenizer(BaichuanTokenizer):
    """Baichuan 7B's name of the class."""


class OrionTokenizer(BaichuanTokenizer):
    """Orion."""


class YiTokenizer(BaichuanTokenizer):
    """Yi, in the folders whose ``model_type`` is ``Yi``."""

    named_tokens = {
        "unk_token": "<unk>",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<unk>",
    }


class ChatGLMTokenizer(HubFiles, SentencePieceBackend):
    """ChatGLM2 and ChatGLM3.

    ``[gMASK]`` and ``sop`` stand before every text. In text only the roles are special tokens, and
    only where asked for.

    Args:
        vocab_file: ``tokenizer.model``.
        encode_special_tokens: whether ``<|user|>`` and the other roles in a text are special
            tokens.
        **kwargs: of transformers.
    """

    model_input_names = ["input_ids", "attention_mask", "position_ids"]
    padding_side = "left"
    named_tokens = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<unk>"}
    writes_names = False
    saved_settings = ("encode_special_tokens",)
    ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
    PREFIX = ("[gMASK]", "sop")
    SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *ROLES)

    def __init__(
        self, vocab_file: str | None = None, encode_special_tokens: bool = False, **kwargs: Any
    ) -> None:
        self.encode_special_tokens = encode_special_tokens
        self._roles = re.compile(f"({'|'.join(map(re.escape, self.ROLES))})")
        self._special_ids: dict[str, int] = {}
        own = set(kwargs.get("added_tokens_decoder") or ())
        super().__init__(
            vocab_file=_required(vocab_file),
            encode_special_tokens=encode_special_tokens,
            **kwargs | self.named_tokens,
        )
        pieces = self.sp_model.get_piece_size()
        self._special_ids = {text: pieces + place for place, text in enumerate(self.SPECIAL)}
        for number in set(self._added_tokens_decoder) - own:  # no token in a text
            self._added_tokens_encoder.pop(str(self._added_tokens_decoder.pop(number)))
        self.tokens_trie = type(self.tokens_trie)()
        self._update_trie()
        self.prefix_tokens = [self._special_ids[text] for text in self.PREFIX]
        self.special_tokens_pattern = "prefix_suffix"
        self._update_total_vocab_size()
        self._extra_special_tokens = [*self.SPECIAL]  # left out by decode, where asked for

    @property
    def vocab_size(self) -> int:
        """Pieces and special tokens."""
        return int(self.sp_model.get_piece_size()) + len(self.SPECIAL)

    def get_added_vocab(self) -> dict[str, int]:
        """Ids of the tokens that are found in a text as a whole."""
        roles = self.ROLES if self.encode_special_tokens else ()
        return {**self._added_tokens_encoder, **{role: self._special_ids[role] for role in roles}}

    def tokenize(  # type: ignore[override]
        self, text: str, **kwargs: object
    ) -> list[str]:
        """The tokens of a text; only added tokens and, where asked for, roles are special."""
        tokens: list[str] = []
        for part in self.tokens_trie.split(text):
            if tokens and tokens[-1] == "[gMASK]" and part.startswith("sop"):
                tokens.append("sop")  # alone it is found nowhere: it is part of words
                part = part.removeprefix("sop")
            tokens += [part] if part in self._added_tokens_encoder else self._tokenize(part)
        return tokens

    def mark_template_tokens(self) -> None:
        """Find the prefix and eos in a text, as a chat template needs."""
        for text in (self.PREFIX[0], self.eos_token):
            number = self._convert_token_to_id(text)
            self._added_tokens_decoder[number] = AddedToken(text, special=True, normalized=False)
            self._added_tokens_encoder[text] = number
        self._update_trie()

    def _tokenize(self, text: str, **kwargs: object) -> list[str]:
        if not self.encode_special_tokens:
            return list(self.sp_model.encode(text, out_type=str))
        tokens: list[str] = []
        for part in filter(None, self._roles.split(text)):
            tokens += [part] if part in self.ROLES else self.sp_model.encode(part, out_type=str)
        return tokens

    def _update_trie(self, unique_no_split_tokens: list[str] | None = None) -> None:
        PreTrainedTokenizer._update_trie(self, unique_no_split_tokens)

    def _convert_token_to_id(self, token: str) -> int:
        number = self._special_ids.get(token)
        return int(self.sp_model.piece_to_id(token)) if number is None else number

    def _convert_id_to_token(self, index: int) -> str:
        pieces = self.sp_model.get_piece_size()
        if index < pieces:
            return str(self.sp_model.id_to_piece(index))
        return self.SPECIAL[index - pieces] if index < self.vocab_size else ""

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text of tokens; special tokens stand in it as they are."""
        return _joined(
            self.sp_model, tokens, {*self.all_special_tokens, *self._added_tokens_encoder}
        )

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """The prefix and a text; of two texts the second one ends with eos."""
        second = [] if token_ids_1 is None else [*token_ids_1, self.eos_token_id]
        return [*self.prefix_tokens, *token_ids_0, *second]

    def _pad(self, encoded_inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Pad, and give each token its place in the text; padding has place 0."""
        length = len(encoded_inputs["input_ids"])
        padded = super()._pad(encoded_inputs, *args, **kwargs)
        places, padding = [*range(length)], [0] * (len(padded["input_ids"]) - length)
        left = (kwargs.get("padding_side") or self.padding_side) == "left"
        padded["position_ids"] = padding + places if left else places + padding
        return padded


def _joined(sentencepiece: Any, tokens: Iterable[str], special: set[str]) -> str:
    """The text of tokens: special ones as they are, those between them as SentencePiece says."""
    groups = groupby(tokens, key=special.__contains__)
    return "".join(
        "".join(group) if is_special else str(sentencepiece.decode_pieces([*group]))
        for is_special, group in groups
    )


def has_fast_class(settings: Mapping[str, Any]) -> bool:
    """Whether ``auto_map`` of a ``tokenizer_config.json`` names a fast class of the hub's code."""
    classes = (settings.get("auto_map") or {}).get("AutoTokenizer") or []
    return len(classes) > 1 and classes[1] is not None


def _required(vocab_file: str | None) -> str:
    if vocab_file is None:
        raise UserError(
            tr("the tokenizer's folder has no tokenizer.model or qwen.tiktoken."),
            hint=tr("download the folder again, with all its files."),
        )
    return vocab_file
