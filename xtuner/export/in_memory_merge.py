"""Merging an adapter with the full model in memory, where it cannot be merged layer by layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from xtuner.export.adapted_class import auto_class_of
from xtuner.export.model_folder import read_adapter_config, read_json, update_json
from xtuner.export.shards import ShardWriter
from xtuner.export.untrained import add_untrained
from xtuner.export.verify import quiet_transformers
from xtuner.export.weights import Weights
from xtuner.model.reward_classes import HEAD, HUB_HEAD
from xtuner.utils.errors import UserError, Where, require
from xtuner.utils.files import copy_side_files
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def merge_in_memory(
    base: Path,
    adapter: Path,
    out: Path,
    *,
    dtype: torch.dtype | None,
    device: str,
    is_clip: bool,
    trust_remote_code: bool = False,
    check: bool = False,
) -> Callable[[Path], None] | None:
    """Merge by peft, layer by layer in fp32, and save by transformers.

    Args:
        base: the base's folder; a quantised one is dequantised first.
        adapter: the adapter's folder.
        out: the folder to write, safetensors in shards of transformers' choice.
        dtype: of the result; the base's own when None (bfloat16 where it was quantised).
        device: ``cpu`` or ``cuda``.
        is_clip: whether base and adapter are a CLIP vision model's.
        trust_remote_code: whether code of the base's folder may run.
        check: compare each layer with base + adapter, without another model in memory.

    Returns:
        With ``check`` a function that compares a written folder with what was merged.
    """
    from xtuner.export.merge_layers import merge_layers
    from xtuner.export.streaming_merge import (
        hub_reward_settings,
        is_classifier,
        labels_of,
        read_adapter,
        resize_embeddings,
    )
    from xtuner.export.verify_reloaded import check_reloaded, digests_of
    from xtuner.model.lora.adapter_files import load_adapter

    task = read_adapter_config(adapter).task_type
    labels = labels_of(adapter) if is_classifier(task) else None
    load: Any = functools.partial(
        load_base,
        is_clip=is_clip,
        num_labels=labels,
        auto_class=None if is_clip else auto_class_of(base, read_adapter(adapter)),
        trust_remote_code=trust_remote_code,
    )
    model = load(base, dtype, device)
    try:
        resize_embeddings(model, read_adapter(adapter))
        wrapped = load_adapter(model, adapter)
        _check_tied(wrapped, adapter)
        merged = merge_layers(wrapped, check=check)
    except (ValueError, RuntimeError, AttributeError) as error:
        raise UserError(
            tr("this adapter cannot be merged: {error}", error=error),
            where=Where(str(adapter)),
        ) from error
    copy_side_files(base, out)
    found = digests_of(merged.state_dict()) if check else None
    settings = hub_reward_settings(adapter, model.config.model_type) if labels == 1 else {}
    if settings:
        state = merged.state_dict()
        state[f"{HUB_HEAD}.weight"] = state.pop(f"{HEAD}.weight")
        merged.save_pretrained(out, max_shard_size="1GB", state_dict=state)
        update_json(out / "config.json", **settings)
    else:
        merged.save_pretrained(out, max_shard_size="1GB")
    if labels is None and not is_clip:
        add_untrained(out, base, merged)
    if found is None:
        return None
    return lambda folder: check_reloaded(found, lambda: load(folder, None, "cpu"))


def _check_tied(model: PeftModel, adapter: Path) -> None:
    """Refuse an adapter on one of two tied weights: merging it would change the other as well.

    Raises:
        UserError: when a layer of the adapter is the embedding or the head of a tied model.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    base: Any = model.get_base_model()
    if not getattr(base.config.get_text_config(), "tie_word_embeddings", False):
        return
    shared = {id(base.get_input_embeddings()), id(base.get_output_embeddings())}
    changed = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer) and id(layer) in shared
    ]
    if changed:
        raise UserError(
            tr(
                "the base ties its embedding and head, and the adapter changes one of them: "
                "{names}",
                names=", ".join(changed),
            ),
            hint=tr("serve it as base and adapter, or train without these modules."),
            where=Where(str(adapter)),
        )


def load_base(
    base: Path,
    dtype: torch.dtype | None,
    device: str,
    *,
    is_clip: bool = False,
    num_labels: int | None = None,
    auto_class: Any = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a base model; a quantised one is dequantised, with a message.

    Args:
        base: the model's folder.
        dtype: of the weights; the model's own when None (bfloat16 where it was quantised).
        device: ``cpu`` or ``cuda``.
        is_clip: whether it is a CLIP vision model.
        num_labels: load it as a sequence classifier with so many labels.
        auto_class: load it by this class; ``AutoModelForCausalLM`` when None.
        trust_remote_code: whether code of the folder may run.
    """
    from transformers import CLIPVisionModel

    from xtuner.model.remote_code import load_pretrained
    from xtuner.model.transformers_models.auto import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
    )

    quantised = "quantization_config" in read_json(base / "config.json")
    if is_clip:
        _require_clip(base)
        clip: Any = CLIPVisionModel.from_pretrained(base, dtype=dtype or "auto")
        on_device: PreTrainedModel = clip.to(device)
        return on_device
    if quantised:
        require("bitsandbytes", extra="quant", purpose=tr("a quantised base"))
        print(tr("the base is quantised: it is dequantised first"))
    kind: Any = auto_class or AutoModelForCausalLM
    kind = AutoModelForSequenceClassification if num_labels else kind
    settings: dict[str, Any] = {"num_labels": num_labels} if num_labels else {}
    with quiet_transformers() if num_labels else nullcontext():  # a new head is reported as missing
        model: Any = load_pretrained(
            kind,
            base,
            trusted=trust_remote_code,
            dtype=dtype or "auto",
            device_map=device,
            **settings,
        )
    if quantised:
        model = model.dequantize()
        # Saving would revert the conversions of the quantised file, which is not possible.
        model._weight_conversions = None
        model = model.to(dtype or torch.bfloat16)
    loaded: PreTrainedModel = model
    return loaded


def _require_clip(base: Path) -> None:
    """Refuse other models: transformers would fill the encoder with random weights.

    Raises:
        UserError: naming what the folder has.
    """
    kind = read_json(base / "config.json").get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise UserError(
            tr("this is a {kind} model, not CLIP.", kind=kind),
            hint=tr("leave out --is-clip."),
            where=Where(str(base / "config.json")),
        )


def reshard(folder: Path, out: Path, max_shard_size: int, safe: bool) -> None:
    """Copy a model folder with its weights in other shards, or as ``.bin``."""
    weights = Weights(folder)
    plan = list(weights.infos.values())
    with ShardWriter(out, plan, max_shard_size, safe) as writer:
        for info in plan:
            writer.write(info.name, weights.read(info.name))
    copy_side_files(folder, out)
