"""From a config's ``llm=dict(...)`` to a transformers model that is ready to be trained."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from xtuner.model.modules import attention
from xtuner.model.modules.sequence_parallel import not_shareable
from xtuner.model.remote_code import ModelSource, find_source, restore_buffers
from xtuner.parallel.sequence.groups import get_sequence_parallel_world_size
from xtuner.registry import BUILDER, READERS
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# What our function computes as well, with the same result.
REPLACED = ("sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
# Layers that mix tokens by attention alone. In others (convolutions, state spaces, linear
# attention) a rank would see its own shard only.
BY_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
TRAINED_METHOD = "bitsandbytes"
"""The ``quant_method`` of weights that an adapter can be trained on."""
HEADS = ("score", "classifier")
"""Of a classifier, which a reward model is trained from without."""
VOCABULARY_MULTIPLE = 64
"""A grown vocabulary is rounded up to this: matrices of such widths are faster."""


def build_llm(
    llm: Mapping[str, Any] | nn.Module,
    *,
    full: bool,
    max_position_embeddings: int | None = None,
) -> Any:
    """Build the language model of a config.

    Args:
        llm: ``dict(type=AutoModelForCausalLM.from_pretrained, ...)``, or a model already built.
        full: all weights are trained. They are then kept in float32 unless the config says
            otherwise: in bfloat16 most updates would be rounded away.
        max_position_embeddings: extend the context to this length by linear scaling of the rotary
            embedding.

    Returns:
        A ``PreTrainedModel``.

    Raises:
        UserError: when ranks share rows, and this model cannot be computed so; when the model
            needs code of its folder, and the config does not say that it may run.
    """
    if isinstance(llm, nn.Module):
        built: Any = llm
    else:
        built = _built(llm, full, max_position_embeddings)
    keep_4bit_layout(built)
    if get_sequence_parallel_world_size() > 1:
        use_shareable_attention(built)
    return built


def require_whole(report: Mapping[str, Any], name_or_path: str, heads: Sequence[str] = ()) -> None:
    """Refuse a model some of whose weights would be random.

    Args:
        report: of ``from_pretrained``: ``missing_keys`` and ``mismatched_keys``.
        name_or_path: the model's.
        heads: names of modules that a training may begin without.

    Raises:
        UserError: naming the first of them.
    """
    wrong = [
        tr("{name}: {found} where its config.json asks for {wanted}", name=n, found=f, wanted=w)
        for n, f, w in (
            (name, list(found), list(wanted))
            for name, found, wanted in sorted(report["mismatched_keys"])
        )
    ]
    missing = [
        tr("{name} is missing", name=name)
        for name in sorted(report["missing_keys"])
        if not set(heads) & set(name.split("."))
    ]
    if wrong or missing:
        shown = "; ".join([*wrong, *missing][:3])
        raise UserError(
            tr("{count} weights are not whole: {shown}", count=len(wrong + missing), shown=shown),
            hint=tr("the files are damaged or of another model; get them again."),
            where=Where(name_or_path),
        )


def use_shareable_attention(llm: PreTrainedModel) -> None:
    """Make a model compute attention by our function, or refuse it.

    Args:
        llm: a transformers model; its attention function may be changed.

    Raises:
        UserError: when rows cannot be shared because something else than that function mixes
            their tokens.
    """
    config = llm.config.get_text_config()
    kinds = {str(kind) for kind in getattr(config, "layer_types", None) or ()}
    if kinds - BY_ATTENTION:
        raise not_shareable(llm, ", ".join(sorted(kinds - BY_ATTENTION)))
    chosen = getattr(llm.config, "_attn_implementation", None)
    if chosen in REPLACED and getattr(llm, "_supports_attention_backend", False):
        llm.set_attn_implementation(attention.register())
        chosen = attention.NAME
    if chosen != attention.NAME or not getattr(llm, "_supports_attention_backend", False):
        raise not_shareable(llm, f"attn_implementation={chosen!r}")


def _built(llm: Mapping[str, Any], full: bool, max_position_embeddings: int | None) -> Any:
    settings = dict(llm)
    if getattr(settings.get("type"), "__name__", "") != "from_pretrained":
        return BUILDER.build(settings)
    source = _source(settings)
    _require_trainable_weights(settings)
    if source is None or source.takes_our_attention:
        settings.setdefault("attn_implementation", attention.register())
    if full and not {"dtype", "torch_dtype", "quantization_config"} & settings.keys():
        settings["dtype"] = torch.float32
    if max_position_embeddings:
        settings["config"] = _with_longer_context(settings, max_position_embeddings)
    checked = _is_transformers(settings["type"]) and "output_loading_info" not in settings
    if checked:
        settings |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    built = BUILDER.build(settings)
    if checked:
        built, report = built
        require_whole(report, str(settings.get("pretrained_model_name_or_path")), HEADS)
    if source is not None and source.is_remote:
        restored = restore_buffers(built)
        if restored:
            text = tr("%d buffers of %s were computed again.")
            logger.info(text, len(restored), source.model_class.__name__)
    return built


def _is_transformers(from_pretrained: object) -> bool:
    """Whether it loads a model of transformers, or of a folder's code, and can report on it."""
    from transformers import PreTrainedModel

    loader = getattr(from_pretrained, "__self__", None)
    is_model = isinstance(loader, type) and issubclass(loader, PreTrainedModel)
    return is_model or hasattr(loader, "_model_mapping")


def _source(settings: dict[str, Any]) -> ModelSource | None:
    """Where the model's class comes from; code of the folder is only trusted where it is needed."""
    loader = getattr(settings["type"], "__self__", None)
    name_or_path = settings.get("pretrained_model_name_or_path")
    if loader is None or name_or_path is None:
        return None
    trusted = bool(settings.get("trust_remote_code"))
    source = find_source(loader, str(name_or_path), trusted=trusted)
    if trusted:
        settings["trust_remote_code"] = source is None or source.is_remote
    return source


def _require_trainable_weights(settings: Mapping[str, Any]) -> None:
    """Refuse a folder whose weights were quantized by a method that has no training.

    Raises:
        UserError: with the way to weights in 16 bits, unless the config names a quantization of the
            same method, such as ``Mxfp4Config(dequantize=True)``.
    """
    from transformers import PreTrainedConfig

    name_or_path = settings.get("pretrained_model_name_or_path")
    if not hasattr(settings["type"], "__self__") or name_or_path is None:
        return
    config, _ = PreTrainedConfig.get_config_dict(str(name_or_path))
    method = (config.get("quantization_config") or {}).get("quant_method", TRAINED_METHOD)
    asked = settings.get("quantization_config")
    named = asked.get("quant_method") if isinstance(asked, Mapping) else None
    named = getattr(asked, "quant_method", named)
    if method in (TRAINED_METHOD, getattr(named, "value", named)):
        return
    raise UserError(
        tr(
            "the weights of {name} are quantized ({method}), and cannot be trained.",
            name=name_or_path,
            method=method,
        ),
        hint=tr(
            "name a folder with weights in bfloat16 (for openai/gpt-oss-20b: "
            "unsloth/gpt-oss-20b-BF16); QLoRA quantizes them itself."
        ),
        where=Where(key="model.llm.pretrained_model_name_or_path"),
    )


def keep_4bit_layout(llm: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in evaluation mode on a CPU.

    It does so at the first forward pass outside training, for speed, and the repacked weights have
    no backward pass: after one sample answer, training would continue with wrong gradients.
    """
    layer: Any
    for layer in llm.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def _with_longer_context(settings: Mapping[str, Any], length: int) -> Any:
    """The model's config with linear scaling of its rotary embedding, where ``length`` needs it."""
    import math

    from xtuner.model.transformers_models.auto import AutoConfig

    config = AutoConfig.from_pretrained(
        settings["pretrained_model_name_or_path"],
        trust_remote_code=settings.get("trust_remote_code", False),
    )
    trained = getattr(config, "max_position_embeddings", None)
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if not trained or not rope:
        raise UserError(
            tr(
                "the context of {name} cannot be extended: its rotary embedding, if it has one, "
                "has no settings.",
                name=config.model_type,
            ),
            hint=tr("remove max_position_embeddings."),
            where=Where(key="model.max_position_embeddings"),
        )
    if length > trained:
        rope.update(rope_type="linear", factor=float(math.ceil(length / trained)))
        config.rope_parameters = rope
        config.max_position_embeddings = length
    return config


def init_from_checkpoint(model: nn.Module, checkpoint: str) -> None:
    """Give a model the weights of an earlier training.

    Args:
        model: changed in place; what the checkpoint does not have stays.
        checkpoint: an ``iter_N.pth`` of this version or of v0.1, a file or a folder (DeepSpeed,
            FSDP).

    Raises:
        UserError: when it is missing, damaged, or of another model.
    """
    where = Where(checkpoint, key="model.pretrained_pth")
    if not Path(checkpoint).exists():
        raise UserError(
            tr("there is no such checkpoint"),
            hint=tr("train the config of pretraining first; it writes iter_N.pth."),
            where=where,
        )
    weights = READERS.get("weights")(checkpoint)
    own = {name: value.shape for name, value in nn.Module.state_dict(model).items()}
    wrong = [name for name, value in weights.items() if own.get(name) != value.shape]
    if wrong:
        named = ", ".join(wrong[:3]) + (", ..." if len(wrong) > 3 else "")
        raise UserError(
            tr(
                "this checkpoint is of another model; {count} of its tensors have no place "
                "here, or another shape: {named}",
                count=len(wrong),
                named=named,
            ),
            where=where,
        )
    model.load_state_dict(weights, strict=False)


def resize_token_embeddings(llm: Any, tokenizer: Any) -> bool:
    """Give the model rows for tokens that the tokenizer has and the model has not.

    New rows start as the mean of the old ones.

    Args:
        llm: the model; changed in place.
        tokenizer: the tokenizer, or the config to build it from.

    Returns:
        Whether the model has grown.
    """
    if isinstance(tokenizer, Mapping):
        tokenizer = BUILDER.build(tokenizer)
    old = _rows(llm.get_input_embeddings().weight)
    if len(tokenizer) <= old:
        return False
    llm.resize_token_embeddings(
        len(tokenizer), pad_to_multiple_of=VOCABULARY_MULTIPLE, mean_resizing=False
    )
    for layer in (llm.get_input_embeddings(), llm.get_output_embeddings()):
        if layer is not None:
            with torch.no_grad(), _whole(layer.weight):
                layer.weight[old:] = layer.weight[:old].float().mean(0).to(layer.weight.dtype)
    return True


def is_zero3_init_enabled() -> bool:
    """Whether DeepSpeed's ZeRO-3 leaves each process only a part of every weight it loads."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    return bool(is_deepspeed_zero3_enabled())


def _rows(weight: Any) -> int:
    """Rows of a weight, of which ZeRO-3 may have left nothing here."""
    return int(getattr(weight, "ds_shape", weight.shape)[0])


def _whole(weight: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context in which a weight that ZeRO-3 has cut is whole, to be changed alike everywhere."""
    if not hasattr(weight, "ds_shape"):
        return contextlib.nullcontext()
    import deepspeed

    context: Any = deepspeed.zero.GatheredParameters([weight], modifier_rank=0)
    return context
