"""Tiny models of the product, their batches, and the plain computation they are compared with.

The plain computation: transformers and peft as they are, on the CPU in float32, one sample after
the other without padding, torch's cross-entropy of all logits.

Shapes: N trained values in all.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpu_checks.quantizing import quantize

IGNORED = -100
VOCABULARY = 512
LENGTHS = (40, 1, 17, 30)
"""Tokens of the samples."""
SIZES: dict[str, Any] = dict(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128) | dict(
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False
)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "mistral": {"sliding_window": 8},
    "gemma2": {"head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 32},
    # values narrower than keys
    "deepseek_v3": dict(q_lora_rank=None, kv_lora_rank=32, qk_rope_head_dim=16, v_head_dim=32)
    | dict(qk_nope_head_dim=32, num_key_value_heads=4, first_k_dense_replace=2),
}


class Outcome(NamedTuple):
    """Of a forward and a backward pass."""

    loss: float
    gradient: Tensor
    """(N,) float32 on the CPU."""


def rows(lengths: Sequence[int] = LENGTHS, vocabulary: int = VOCABULARY) -> list[dict[str, Any]]:
    """Random samples, whose first third is not trained."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for length in lengths:
        ids = torch.randint(3, vocabulary, (length,), generator=draw).tolist()
        prompt = length // 3
        found.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
    return found


def causal_lm(architecture: str, dtype: torch.dtype, device: str) -> Any:
    """A transformers model with random weights, the same on every device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from xtuner.model.modules import attention

    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **SIZES | ARCHITECTURES[architecture])
    llm = AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation=attention.register()
    )
    return llm.to(device)


def finetuned(
    method: str,
    device: str,
    architecture: str = "qwen2",
    packed: bool = True,
    compiled: bool = False,
    checkpointing: bool | dict[str, Any] = True,
    dtype: str = "bfloat16",
) -> Any:
    """``SupervisedFinetune`` of a tiny model; its adapter computes something from the start."""
    from peft import LoraConfig

    from xtuner.model import SupervisedFinetune

    full = method == "full"
    frozen = getattr(torch, dtype)  # that of autocast, as runs have it
    llm = causal_lm(architecture, torch.float32 if full else frozen, device)
    if method == "qlora":
        quantize(llm, device)
    torch.manual_seed(1)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    lora.init_lora_weights = False
    model = SupervisedFinetune(
        llm,
        lora=None if full else lora,
        use_varlen_attn=packed,
        compile=compiled,
        use_activation_checkpointing=checkpointing,
    )
    return model.to(device).train()


def batch_of(model: Any, device: str) -> Any:
    """The samples as the model's data, as the training loop prepares them."""
    from xtuner.dataset.collate_fns import default_collate_fn
    from xtuner.engine.runner.loops import to_device

    data = default_collate_fn(rows(), use_varlen_attn=model.use_varlen_attn)["data"]
    counts = model.num_items(data)
    where = torch.device(device)
    return to_device(model.prepare_batch(data, where), where), counts


def outcome(model: Any, dtype: str, device: str, scale: float = 1.0) -> Outcome:
    """Loss and gradient of the product's model.

    Args:
        model: on the device.
        dtype: of autocast, in 16 bits.
        device: ``cuda`` or ``cpu``.
        scale: of the loss in the backward pass, as a gradient scaler has it.
    """
    cast = torch.autocast(device, getattr(torch, dtype))
    if device == "cuda":  # whether rows can be unpadded is found out at the first batch
        data, counts = batch_of(model, device)
        with cast, torch.no_grad():
            model(data, mode="loss", num_items_in_batch=counts)
    data, counts = batch_of(model, device)
    with cast:
        loss = model(data, mode="loss", num_items_in_batch=counts)["loss"]
    (loss * scale).backward()
    return Outcome(loss.item(), _gradient(model.llm) / scale)


def plain_outcome(model: Any) -> Outcome:
    """The same by the plain computation."""
    from xtuner.proving.training import plain_training

    plain = plain_copy(model)
    return Outcome(plain_training(plain, rows()).loss, _gradient(plain))


def plain_copy(model: Any) -> Any:
    """transformers' (and peft's) model with the same weights, on the CPU in float32."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(model.causal_lm.config)
    plain: Any = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    if model.has_adapter:
        plain = get_peft_model(plain, copy.deepcopy(model.llm.peft_config["default"]))
    weights = dict(model.llm.named_parameters())
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            weight.copy_(_values(weights[name]))
    return plain.train()


def _values(weight: Tensor) -> Tensor:
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state)


def _gradient(llm: Any) -> Tensor:
    parts = [
        torch.zeros(weight.numel()) if weight.grad is None else weight.grad.flatten().float().cpu()
        for weight in llm.parameters()
        if weight.requires_grad
    ]
    return torch.cat(parts)


def gap(found: Tensor, expected: Tensor) -> float:
    """The relative distance; infinite where values are not finite."""
    found, expected = found.double().cpu(), expected.double().cpu()
    distance = (found - expected).norm() / expected.norm().clamp(min=1e-30)
    return float(torch.nan_to_num(distance, nan=torch.inf))


def gaps(found: Outcome, expected: Outcome) -> list[float]:
    """Relative differences of loss and gradient."""
    return [
        abs(found.loss - expected.loss) / abs(expected.loss),
        gap(found.gradient, expected.gradient),
    ]
