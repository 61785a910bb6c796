"""Tiny models and tokenizers, made on the spot: nothing in the tests is downloaded.

``make_tokenizer`` gives a real fast tokenizer of one of three kinds; ``make_model`` a real
transformers model with two layers of width 64; ``save_tiny`` puts both in a folder as the Hugging
Face hub has them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

TEXTS = [
    "Please introduce yourself. I am a small assistant made for tests.",
    "请做一下自我介绍。我是一个用于测试的小助手。",
    "<|User|>:Give three tips for staying healthy.\n<|Bot|>:Eat well, sleep well, walk.",
    "What is the capital of France? The capital of France is Paris.",
    "def add(a, b):\n    return a + b\n",
    "0 1 2 3 4 5 6 7 8 9 ! ? , . : ; ' \" ( ) [ ] { } < > | / \\ + - * = _ & % $ # @",
] * 4

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SPECIAL = ["<s>", "</s>", "<pad>", "<unk>", "<|im_start|>", "<|im_end|>"]


def make_tokenizer(
    kind: str = "byte_level", vocab_size: int = 512, chat_template: str | None = CHAT_TEMPLATE
) -> PreTrainedTokenizerFast:
    """Train a tokenizer.

    Args:
        kind: ``byte_level`` (GPT-2 and Qwen style BPE, no bos added), ``metaspace`` (SentencePiece
            style Unigram with a leading space) or ``bos_eos`` (byte-level BPE whose tokenizer adds
            bos and eos by itself).
        vocab_size: size of the vocabulary.
        chat_template: its Jinja chat template, or None.
    """
    if kind == "metaspace":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer: Any = trainers.UnigramTrainer(
            vocab_size=vocab_size, special_tokens=SPECIAL, unk_token="<unk>"
        )
    elif kind in ("byte_level", "bos_eos"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
    else:
        raise ValueError(f"no such kind of tokenizer: {kind!r}")
    tokenizer.train_from_iterator(TEXTS, trainer)
    if kind == "bos_eos":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=chat_template,
    )


def make_model(arch: str = "llama", **overrides: Any) -> Any:
    """Build a two-layer model with random weights (seeded by the caller) of a real architecture.

    Args:
        arch: a ``model_type`` of transformers: llama, qwen2, qwen3, mistral, gemma2, phi3, ...
        overrides: settings of its config.
    """
    from transformers import AutoConfig

    settings: dict[str, Any] = dict(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=False,
    )
    settings.update(overrides)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **settings))


def save_tiny(folder: Path, arch: str = "llama", seed: int = 0, **overrides: Any) -> Path:
    """Save a tiny model and its tokenizer as a Hugging Face folder and return the folder."""
    import torch

    torch.manual_seed(seed)
    make_model(arch, **overrides).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
