"""The embedded base model: a small Llama with random weights and a byte-level tokenizer.

Everything is made from the package's own files, so that the first run needs no network. What is
written is an ordinary Hugging Face folder; nothing else in XTuner knows that it is special.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner.quickstart.rows import read_rows
from xtuner.utils.files import written_aside

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SEED = 0
VOCAB_SIZE = 1024
SPECIAL_TOKENS = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    # Wider than transformers' 0.02: LoRA leaves the output layer as it is, and its logits would be
    # too close together for confident predictions.
    "initializer_range": 0.08,
}


def make_base(save_dir: str | os.PathLike[str]) -> Path:
    """Write the base model's folder, unless it exists.

    Args:
        save_dir: the folder to write.

    Returns:
        The folder.
    """
    folder = Path(save_dir)
    if (folder / "config.json").exists():
        return folder
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        **SIZES,
    )
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = LlamaForCausalLM(config)
    with written_aside(folder) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train the byte-level BPE tokenizer on the embedded rows; any text can be encoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (message["content"] for row in read_rows() for message in row["messages"])
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
