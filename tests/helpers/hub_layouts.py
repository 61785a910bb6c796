"""Tokenizer files as the hub folders of each family have them, trained on a few lines of text.

The hub folders of these families bring tokenizer code of their own and a ``tokenizer.model`` or
``qwen.tiktoken``, and most of them no ``tokenizer.json``. File names, class names, ``auto_map``,
special tokens and the settings of the SentencePiece models are those of the hub; the vocabularies
are small. The Python files raise when they are run: a test that passes has run none of them.
"""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from xtuner.model.transformers_models.tokenizers.conversion import from_sentencepiece

TEXTS = [
    "Please introduce yourself. I am a small assistant made for tests, and I speak English.",
    "请做一下自我介绍。我是一个用于测试的小助手，请问有什么可以帮您？今天天气很好。",
    "What is the capital of France? The capital of France is Paris, and it is large.",
    "def add(a, b):\n    if a > b:\n        return a + b\n\treturn a - b\n\n\nprint(add(1, 2))",
    "<div class=\"a\">  <b>one</b>    two </div>\r\n\t\tSELECT * FROM t WHERE x = '0x0A';",
    "问：你好\n\n答：您好！我们、他们、都是：100%。[Round 1]\n\n1. first\n2. second\n   - third",
    "It's he'll they've I'm you're we'd. The theory of the other mother, nothing but the truth.",
]
"""Repeated words and characters, so that the few merges there are cross all kinds of text."""

USER_DEFINED = 4
"""``Type.USER_DEFINED`` of a piece in SentencePiece's protobuf."""
QWEN_SPECIAL, CHATGLM_SPECIAL = 208, 9
"""Special tokens that the code of Qwen and ChatGLM 3 puts after the vocabulary."""


@dataclass(frozen=True)
class Layout:
    """The tokenizer files of a family.

    Attributes:
        tokenizer_class: of ``tokenizer_config.json``.
        modules: classes of ``auto_map``: the slow one and the fast one, with their modules; none
            where the folder has no code for its tokenizer.
        vocab_file: name of the vocabulary.
        settings: the rest of ``tokenizer_config.json``.
        sentencepiece: settings of the SentencePiece trainer beside the common ones.
        symbols: user-defined pieces at the end of the SentencePiece model.
        renamed: special tokens of ``added_tokens_decoder`` that take the ids of the last pieces.
        added: special tokens of ``added_tokens_decoder`` whose ids follow the pieces.
        special_tokens_map: whether the folder has that file.
    """

    tokenizer_class: str
    modules: tuple[str | None, ...] = ()
    vocab_file: str = "tokenizer.model"
    settings: dict[str, Any] = field(default_factory=dict)
    sentencepiece: dict[str, Any] = field(default_factory=dict)
    symbols: tuple[str, ...] = ()
    renamed: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    special_tokens_map: bool = True


_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
_INTERNLM2_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_MINICPM_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{'<用户>' + message['content'].strip() + '<AI>'}}"
    "{% else %}{{message['content'].strip()}}{% endif %}{% endfor %}"
)
_DEEPSEEK_NAMES = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
_DEEPSEEK_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ 'User: ' + message['content'] + '\n\n' }}{% elif message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_INTERNLM2_ADDED = (
    *("<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>"),
    *("<|im_end|>", "<|im_start|>"),
)
_INTERNLM2_SYMBOLS = ("Ｅ", "ｆ", "——", "……", *(f"[UNUSED_TOKEN_{n}]" for n in range(8)))
_INTERNVL_ADDED = (
    *("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>"),
    *("<ref>", "</ref>", "<box>", "</box>"),
)


def _added_token(text: str, **flags: bool) -> dict[str, Any]:
    settings = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": text, **settings, **flags}


def _baichuan_names(single_word: bool) -> dict[str, Any]:
    flags = {"normalized": True, "single_word": single_word}
    names = {**_NAMES, "pad_token": "<unk>"}
    tokens = {name: _added_token(text, **flags) for name, text in names.items()}
    return {name: {"__type": "AddedToken", **token} for name, token in tokens.items()}


def _baichuan(tokenizer_class: str, reserved: int, single_word: bool) -> Layout:
    return Layout(
        tokenizer_class,
        (f"tokenization_baichuan.{tokenizer_class}", None),
        settings={
            "add_bos_token": False,
            "add_eos_token": False,
            "model_max_length": 4096,
            "clean_up_tokenization_spaces": False,
            "sp_model_kwargs": {},
            **_baichuan_names(single_word),
        },
        sentencepiece={
            "user_defined_symbols": [f"<reserved_{number}>" for number in range(reserved)]
        },
    )


_YI_NAMES = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
_YI_NAMES |= {"pad_token": "<unk>", "unk_token": "<unk>"}


def _sentencepiece(tokenizer_class: str, module: str, names: dict[str, str]) -> Layout:
    """Orion's and Yi's: SentencePiece without a chat template."""
    pieces = {"bos_piece": names["bos_token"], "eos_piece": names["eos_token"]}
    return Layout(
        tokenizer_class,
        (f"{module}.{tokenizer_class}", None),
        settings={
            "add_bos_token": False,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 4096,
            "sp_model_kwargs": {},
            **names,
        },
        sentencepiece=pieces,
    )


_INTERNLM2 = Layout(
    "InternLM2Tokenizer",
    (
        "tokenization_internlm2.InternLM2Tokenizer",
        "tokenization_internlm2_fast.InternLM2TokenizerFast",
    ),
    settings={
        **_NAMES,
        "additional_special_tokens": [*reversed(_INTERNLM2_ADDED)],
        "chat_template": _INTERNLM2_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "decode_with_prefix_space": False,
        "model_max_length": 1000000000000000019884624838656,
    },
    symbols=_INTERNLM2_SYMBOLS,
    renamed=_INTERNLM2_ADDED,
)
_CHATGLM = Layout(
    "ChatGLMTokenizer",
    ("tokenization_chatglm.ChatGLMTokenizer", None),
    settings={"name_or_path": "THUDM/chatglm", "remove_space": False, "do_lower_case": False},
    sentencepiece={"add_dummy_prefix": True},
    special_tokens_map=False,
)

LAYOUTS = {
    "internlm": Layout(
        "InternLMTokenizer",
        ("tokenization_internlm.InternLMTokenizer", None),
        settings={
            **_NAMES,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1000000000000000019884624838656,
        },
        symbols=("<eoh>", "<eoa>", "<TOKENS_UNUSED_2>"),
    ),
    "internlm2": _INTERNLM2,
    "internlm3": Layout(
        "InternLM3Tokenizer",
        ("tokenization_internlm3.InternLM3Tokenizer", None),
        settings={
            **_NAMES,
            "add_bos_token": True,
            "add_eos_token": False,
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
            "chat_template": _INTERNLM2_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1000000000000000019884624838656,
            "sp_model_kwargs": {},
            "spaces_between_special_tokens": False,
            "use_default_system_prompt": False,
        },
        sentencepiece={"add_dummy_prefix": True},
        symbols=tuple(f"[UNUSED_TOKEN_{number}]" for number in range(4)),
        renamed=("<|im_start|>", "<|im_end|>"),
    ),
    "internvl": Layout(
        "InternLM2Tokenizer",
        ("tokenization_internlm2.InternLM2Tokenizer", None),
        settings={
            **_INTERNLM2.settings,
            "additional_special_tokens": [*reversed(_INTERNLM2_ADDED), *_INTERNVL_ADDED],
        },
        symbols=_INTERNLM2_SYMBOLS,
        renamed=_INTERNLM2_ADDED,
        added=_INTERNVL_ADDED,
    ),
    "baichuan": _baichuan("BaiChuanTokenizer", 0, single_word=False),
    "baichuan2": _baichuan("BaichuanTokenizer", 110, single_word=True),
    "orion": _sentencepiece(
        "OrionTokenizer", "tokenization_orion", _NAMES | {"pad_token": "<unk>"}
    ),
    "yi": _sentencepiece("YiTokenizer", "tokenization_yi", _YI_NAMES),
    "chatglm2": _CHATGLM,
    "chatglm3": _CHATGLM,
    "minicpm": Layout(
        "LlamaTokenizer",
        settings={
            **_NAMES,
            "pad_token": "<unk>",
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "legacy": True,
            "model_max_length": 1000000000000000019884624838656,
            "sp_model_kwargs": {},
            "use_default_system_prompt": False,
            "chat_template": _MINICPM_TEMPLATE,
        },
        sentencepiece={"add_dummy_prefix": True},
    ),
    "deepseek": Layout(
        "LlamaTokenizerFast",
        vocab_file="tokenizer.json",
        settings={
            **_DEEPSEEK_NAMES,
            "pad_token": _DEEPSEEK_NAMES["eos_token"],
            "unk_token": None,
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "legacy": True,
            "model_max_length": 4096,
            "sp_model_kwargs": {},
            "chat_template": _DEEPSEEK_TEMPLATE,
        },
        special_tokens_map=False,
    ),
    "qwen": Layout(
        "QWenTokenizer",
        ("tokenization_qwen.QWenTokenizer", None),
        vocab_file="qwen.tiktoken",
        settings={"model_max_length": 8192},
        special_tokens_map=False,
    ),
}


def write_tokenizer(folder: Path, family: str) -> int:
    """Write the tokenizer files of a family into a folder.

    Args:
        folder: made where it does not exist; files of other names are left alone.
        family: a key of ``LAYOUTS``.

    Returns:
        How many token ids there are: the least ``vocab_size`` of a model for it.
    """
    layout = LAYOUTS[family]
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(layout.settings)
    if layout.modules:
        config["auto_map"] = {"AutoTokenizer": list(layout.modules)}
    config["tokenizer_class"] = layout.tokenizer_class
    if layout.vocab_file == "qwen.tiktoken":
        ids = _write_ranks(folder / layout.vocab_file) + QWEN_SPECIAL
    elif layout.vocab_file == "tokenizer.json":
        ids = _write_byte_level(folder / layout.vocab_file, config)
    else:
        pieces = _write_sentencepiece(folder / layout.vocab_file, layout)
        special = dict(enumerate(["<unk>", "<s>", "</s>"]))
        special |= dict(enumerate(layout.renamed + layout.added, pieces - len(layout.renamed)))
        if len(special) > 3:
            config["added_tokens_decoder"] = {
                str(number): {**_added_token(text), "special": True}
                for number, text in special.items()
            }
        ids = pieces + len(layout.added)
        ids += CHATGLM_SPECIAL if layout.tokenizer_class == "ChatGLMTokenizer" else 0
    if layout.tokenizer_class == "LlamaTokenizer":
        _write_converted(folder)
    _write_json(folder / "tokenizer_config.json", config)
    if layout.special_tokens_map:
        names = [*_NAMES, "additional_special_tokens"]
        tokens = {name: config[name] for name in names if name in config}
        plain = {name: _without_type(token) for name, token in tokens.items()}
        _write_json(folder / "special_tokens_map.json", plain)
    write_code(folder, *(module.split(".")[0] for module in layout.modules if module))
    return ids


def write_code(folder: Path, *modules: str) -> None:
    """Write Python files that raise when they are run, where a hub folder has code.

    Args:
        folder: of the model.
        modules: names of the files, without ``.py``: ``modeling_internlm2``, ...
    """
    for module in modules:
        code = f"raise RuntimeError('the code of a model folder has run: {module}.py')\n"
        (folder / f"{module}.py").write_text(code, "utf-8")


def _write_sentencepiece(file: Path, layout: Layout) -> int:
    """Train a SentencePiece model with the families' common settings; the number of its pieces."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in TEXTS * 4 for line in text.split("\n")),
        model_writer=model,
        **{
            "model_type": "bpe",
            "vocab_size": 640,
            "hard_vocab_limit": False,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "add_dummy_prefix": False,
            "remove_extra_whitespaces": False,
            "allow_whitespace_only_pieces": True,
            "split_digits": True,
            "character_coverage": 0.995,
            "minloglevel": 2,
            **layout.sentencepiece,
        },
    )
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    for symbol in layout.symbols:
        proto.pieces.add(piece=symbol, score=0.0, type=USER_DEFINED)
    file.write_bytes(proto.SerializeToString())
    return len(proto.pieces)


def _write_ranks(file: Path) -> int:
    """Train byte-level BPE and write tiktoken's file of ranks; the number of its tokens."""
    tokenizer = _byte_level(special=[])
    ranked = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    lines = [f"{base64.b64encode(_as_bytes(token)).decode()} {rank}\n" for token, rank in ranked]
    file.write_text("".join(lines), "utf-8")
    return len(ranked)


def _byte_level(special: list[str]) -> Tokenizer:
    """Train byte-level BPE; special tokens have the first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
    )
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    return tokenizer


def _write_byte_level(file: Path, names: dict[str, Any]) -> int:
    """Train byte-level BPE, write ``tokenizer.json`` that puts bos first; the tokens' number."""
    tokenizer = _byte_level(special=[names["bos_token"], names["eos_token"]])
    _put_bos_first(tokenizer, names["bos_token"])
    tokenizer.save(str(file))
    return int(tokenizer.get_vocab_size())


def _write_converted(folder: Path) -> None:
    """Write ``tokenizer.json`` beside a SentencePiece model, as transformers 4 converted it."""
    tokenizer = from_sentencepiece(folder / "tokenizer.model", split_symbols=True)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    _put_bos_first(tokenizer, "<s>")
    tokenizer.save(str(folder / "tokenizer.json"))


def _put_bos_first(tokenizer: Tokenizer, bos: str) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )


def _as_bytes(token: str) -> bytes:
    """A token of byte-level BPE as the bytes it stands for."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table |= {chr(256 + place): byte for place, byte in enumerate(others)}
    return bytes(table[character] for character in token)


def _without_type(token: Any) -> Any:
    """A special token as ``special_tokens_map.json`` has it."""
    if not isinstance(token, dict):
        return token
    return {key: value for key, value in token.items() if key != "__type"}


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
