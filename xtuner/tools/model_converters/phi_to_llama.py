"""``xtuner convert phi_to_llama``: a Phi-3 model under Llama's names, for programs that know Llama.

Phi-3 keeps queries, keys and values in one matrix, and gate and up projection in another; cut
apart, they are a Llama.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from xtuner.tools.arguments import add_max_shard_size
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from transformers import LlamaConfig

    from xtuner.export.weights import TensorInfo

KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range",
    "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "dtype",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("source", help=tr("a Phi-3 model"))
    parser.add_argument("out", help=tr("the folder to write"))
    add_max_shard_size(parser)


def run(args: argparse.Namespace) -> int:
    """Cut the matrices apart, a tensor at a time."""
    from xtuner.export import model_folder
    from xtuner.export.shards import ShardWriter, check_space, parse_size
    from xtuner.export.weights import Weights
    from xtuner.utils.files import written_aside

    out, size = Path(args.out), parse_size(args.max_shard_size)
    source = model_folder.find_model(args.source)
    model_folder.check_output(out, [source])
    config = _llama_config(source)
    weights = Weights(source)
    check_space(out, weights.nbytes)
    plan = [part for info in weights.infos.values() for part in _parts(info, config)]
    with written_aside(out) as aside:
        with ShardWriter(aside, plan, size) as writer:
            for name, info in weights.infos.items():
                tensor = weights.read(name)
                start = 0
                for part in _parts(info, config):
                    writer.write(part.name, tensor[start : start + part.shape[0]])
                    start += part.shape[0]
        config.save_pretrained(aside)
        model_folder.copy_tokenizer(source, aside)
    print(tr("wrote {out}", out=out))
    return 0


def _llama_config(source: Path) -> LlamaConfig:
    """Llama's config of a Phi-3 model.

    Raises:
        UserError: when it is no Phi-3 model, or one whose positions Llama does not compute.
    """
    from transformers import LlamaConfig, Phi3Config

    from xtuner.export.model_folder import read_json

    where = Where(str(source / "config.json"))
    kind = read_json(source / "config.json").get("model_type")
    if kind != "phi3":
        raise UserError(tr("this is a {kind} model, not phi3.", kind=kind), where=where)
    phi = Phi3Config.from_pretrained(source)
    rope = dict(phi.rope_parameters or {})
    if rope.get("rope_type") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            tr("Llama does not support the LongRoPE scaling of long-context Phi-3 models."),
            where=where,
        )
    window = getattr(phi, "sliding_window", None)
    if window:
        print(
            tr(
                "Phi-3 attends to the last {window} tokens, Llama to all: they agree up to "
                "{window} tokens",
                window=window,
            )
        )
    kept = {name: getattr(phi, name) for name in KEPT}
    theta = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    return LlamaConfig(**kept, rope_parameters=theta, architectures=["LlamaForCausalLM"])


def _parts(info: TensorInfo, config: LlamaConfig) -> Iterator[TensorInfo]:
    """What a tensor is cut into, by its rows; itself where it stays whole."""
    from xtuner.export.weights import TensorInfo

    width = config.hidden_size // config.num_attention_heads
    key_heads = config.num_key_value_heads or config.num_attention_heads
    queries, keys = config.num_attention_heads * width, key_heads * width
    cuts = {
        "qkv_proj": {"q_proj": queries, "k_proj": keys, "v_proj": keys},
        "gate_up_proj": dict.fromkeys(("gate_proj", "up_proj"), config.intermediate_size),
    }
    for whole, rows in cuts.items():
        if f".{whole}." in info.name:
            for name, count in rows.items():
                shape = (count, *info.shape[1:])
                yield TensorInfo(info.name.replace(whole, name), shape, info.dtype)
            return
    yield info
