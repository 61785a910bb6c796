"""Building the language model of a config: its weights, number format, context length, adapter.

Everything takes either a config dict (``dict(type=AutoModelForCausalLM.from_pretrained, ...)``) or
the built thing itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from torch import nn

from xtuner.model.modules import attention
from xtuner.registry import BUILDER
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

# Linear layers in the arithmetic of which bitsandbytes, GPTQ and their kin replace nn.Linear.
QUANTIZED_LINEAR = ("Linear4bit", "Linear8bitLt", "Params4bit", "QuantLinear", "HQQLinear")
# RoPE variants whose factor may be changed for a longer context.
LINEAR_ROPE = ("default", "linear")


def build(part: Any) -> Any:
    """Build a config dict; return anything else as it is."""
    return BUILDER.build(dict(part)) if isinstance(part, Mapping) else part


def build_llm(
    llm: Any, *, trained: bool, max_position_embeddings: int | None = None
) -> nn.Module:
    """Build a language model, ready to be trained.

    Without a ``dtype`` in the dict, weights that are trained are loaded in float32, whatever the
    folder has: an optimizer's small steps would be lost in a shorter format. Weights that stay
    frozen keep the folder's format.

    Args:
        llm: a config dict or a model.
        trained: whether all weights are trained (not only an adapter).
        max_position_embeddings: the context length wanted, or None for the model's own.

    Returns:
        The model, with its attention computed by ``modules.attention`` unless the dict names an
        ``attn_implementation``.

    Raises:
        UserError: when it is not a causal language model, or the context cannot be extended.
    """
    chosen = False
    if isinstance(llm, Mapping):
        settings = dict(llm)
        chosen = settings.get("attn_implementation") is not None
        if getattr(settings.get("type"), "__name__", "") == "from_pretrained":
            _choose_dtype(settings, trained)
            if max_position_embeddings:
                settings["config"] = _longer_config(settings, max_position_embeddings)
        llm = BUILDER.build(settings)
    elif max_position_embeddings and max_position_embeddings > _context(llm.config):
        raise UserError(
            tr(
                "max_position_embeddings extends a model while it is loaded; this one is built.",
                "max_position_embeddings 在加载模型时生效，而这里给出的是已构建的模型。",
            ),
            hint="llm=dict(type=AutoModelForCausalLM.from_pretrained, ...)",
            where=Where(key="model.max_position_embeddings"),
        )
    base = base_of(llm)
    if not hasattr(base, "get_output_embeddings"):
        raise UserError(
            tr(
                f"model.llm is a {type(llm).__name__}, which is not a causal language model.",
                f"model.llm 是 {type(llm).__name__}，不是因果语言模型。",
            ),
            where=Where(key="model.llm"),
        )
    current = getattr(base.config, "_attn_implementation", None)
    if not chosen and current in ("sdpa", None):
        attention.use_for(base)
    base.config.use_cache = False
    return llm


def base_of(llm: Any) -> Any:
    """The transformers model under an adapter, or the model itself."""
    return llm.get_base_model() if isinstance(llm, PeftModel) else llm


def is_quantized(llm: Any) -> bool:
    """Whether a model's linear layers hold 4- or 8-bit weights."""
    if getattr(base_of(llm), "is_quantized", False):
        return True
    return any(type(module).__name__ in QUANTIZED_LINEAR for module in llm.modules())


def _choose_dtype(settings: dict[str, Any], trained: bool) -> None:
    if "torch_dtype" in settings:  # transformers 4 called it so
        settings.setdefault("dtype", settings.pop("torch_dtype"))
    quantized = settings.get("quantization_config") is not None
    if trained and not quantized and settings.get("dtype") is None:
        settings["dtype"] = torch.float32


def _longer_config(settings: Mapping[str, Any], wanted: int) -> Any:
    """The model's config for a context of ``wanted`` tokens, by linearly scaled positions."""
    from transformers import AutoConfig

    config = build(settings.get("config"))
    if config is None:
        hub = ("trust_remote_code", "revision", "cache_dir", "local_files_only", "token")
        config = AutoConfig.from_pretrained(
            settings["pretrained_model_name_or_path"],
            **{key: settings[key] for key in hub if key in settings},
        )
    text = config.get_text_config()
    length = _context(config)
    if length == 0 or wanted <= length:
        return config
    rope = dict(getattr(text, "rope_parameters", None) or {})
    kind = rope.get("rope_type", "default")
    if kind not in LINEAR_ROPE:
        raise UserError(
            tr(
                f"this model's positions are of the kind {kind!r}, good for {length} tokens; "
                f"they cannot be stretched to {wanted}.",
                f"该模型的位置编码是 {kind!r}，支持 {length} 个 token，无法线性扩展到 {wanted}。",
            ),
            hint=tr(
                f"set max_position_embeddings to at most {length}.",
                f"请把 max_position_embeddings 设为不超过 {length}。",
            ),
            where=Where(key="model.max_position_embeddings"),
        )
    factor = float(rope.get("factor") or 1.0) if kind == "linear" else 1.0
    own = text.max_position_embeddings
    text.rope_parameters = {
        **rope, "rope_type": "linear", "factor": float(math.ceil(wanted / length) * factor)
    }  # fmt: skip
    text.max_position_embeddings = max(own, wanted)
    return config


def _context(config: Any) -> int:
    """Tokens that a model's positions are good for; 0 when its config does not say."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 0)


def grow_vocabulary(llm: Any, tokenizer: Any) -> bool:
    """Give the model rows for tokens that its tokenizer has grown, as means of the old ones.

    Args:
        llm: the model, before an adapter is put on.
        tokenizer: a config dict or a tokenizer.

    Returns:
        Whether the model grew; then its embeddings and head have to be trained and saved.

    Raises:
        UserError: when the head is quantised.
    """
    length = len(build(tokenizer))
    before = llm.get_input_embeddings().weight.shape[0]
    if length <= before:
        return False
    head = llm.get_output_embeddings()
    if head is not None and type(head) is not nn.Linear:
        raise UserError(
            tr(
                f"the tokenizer has {length} tokens and the model {before}; its output layer is a "
                f"{type(head).__name__}, which cannot grow.",
                f"分词器有 {length} 个 token，而模型有 {before} 个；输出层是 "
                f"{type(head).__name__}，无法扩展。",
            ),
            hint=tr(
                "leave lm_head out of the quantisation (llm_int8_skip_modules=['lm_head']).",
                "请不要量化 lm_head（llm_int8_skip_modules=['lm_head']）。",
            ),
            where=Where(key="model.tokenizer"),
        )
    # A multiple of 64 suits matrix units; transformers' own way draws new rows about the mean.
    llm.resize_token_embeddings(length, pad_to_multiple_of=64, mean_resizing=False)
    for layer in {llm.get_input_embeddings(), llm.get_output_embeddings()} - {None}:
        for parameter in (layer.weight, getattr(layer, "bias", None)):
            if parameter is not None and not parameter.is_meta:
                mean = parameter.data[:before].float().mean(0).to(parameter.dtype)
                parameter.data[before:] = mean
    return True


def add_adapter(llm: Any, lora: Any, peft_model: str | None, *, grown: bool) -> PeftModel:
    """Put a LoRA adapter on a model; only the adapter is trained from then on.

    Args:
        llm: the model.
        lora: a ``LoraConfig`` or its config dict. Without ``target_modules``, all linear layers but
            the head get an adapter.
        peft_model: folder of an adapter to go on from, or None for a new one.
        grown: whether the vocabulary grew; embeddings and head are then trained whole.

    Raises:
        UserError: when ``peft_model`` has no adapter in it.
    """
    for parameter in llm.parameters():
        parameter.requires_grad_(False)
    if peft_model is not None:
        return _adapter_from(llm, peft_model)
    config: LoraConfig = build(lora)
    if config.peft_type == PeftType.LORA and config.target_modules is None:
        config.target_modules = linear_layers(llm)
    if grown:
        config.modules_to_save = sorted({*(config.modules_to_save or []), *embedding_names(llm)})
    if config.task_type is None:
        config.task_type = "CAUSAL_LM"
    return get_peft_model(llm, config)


def _adapter_from(llm: Any, folder: str) -> PeftModel:
    if Path(folder).exists() and not (Path(folder) / "adapter_config.json").is_file():
        raise UserError(
            tr(
                "there is no adapter in this folder (no adapter_config.json).",
                "这个文件夹中没有适配器（缺少 adapter_config.json）。",
            ),
            hint=tr(
                "give model.peft_model the folder that 'xtuner convert pth_to_hf' wrote.",
                "model.peft_model 应为 'xtuner convert pth_to_hf' 写出的文件夹。",
            ),
            where=Where(folder, key="model.peft_model"),
        )
    return PeftModel.from_pretrained(llm, folder, is_trainable=True)


def linear_layers(llm: Any) -> list[str]:
    """Last parts of the names of all linear layers but the head, quantised ones too."""
    head = llm.get_output_embeddings()
    found = {
        name.rpartition(".")[2]
        for name, module in llm.named_modules()
        if module is not head
        and (isinstance(module, nn.Linear) or type(module).__name__ in QUANTIZED_LINEAR)
    }
    head_name = next((name for name, module in llm.named_modules() if module is head), "")
    return sorted(found - {head_name.rpartition(".")[2]})


def embedding_names(llm: Any) -> set[str]:
    """Last parts of the names of the embeddings and of the head."""
    layers = {id(llm.get_input_embeddings()), id(llm.get_output_embeddings())}
    return {
        name.rpartition(".")[2] for name, module in llm.named_modules() if id(module) in layers
    }
