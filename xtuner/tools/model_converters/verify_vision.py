"""The last step of ``convert pth_to_hf`` for LLaVA and InternVL: what was written is verified."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner.utils.lang import tr

if TYPE_CHECKING:
    import torch
    from mmengine import Config

    from xtuner.export.trained_weights import TrainedWeights
    from xtuner.model.base import FinetuneModel


def verify_vision_model(
    cfg: Config,
    weights: TrainedWeights,
    aside: Path,
    written: FinetuneModel,
    written_dtype: torch.dtype | None,
    args: argparse.Namespace,
) -> None:
    """Verify a LLaVA or InternVL model: each weight, and of small models the logits.

    Args:
        cfg: the config.
        weights: the checkpoint's.
        aside: what was written.
        written: what it was written of.
        written_dtype: the dtype that was asked for.
        args: the command's.
    """
    import torch

    from xtuner.export import verify, verify_vision
    from xtuner.model.internvl import InternVL_V1_5
    from xtuner.model.llava import LLaVAModel
    from xtuner.registry import BUILDER

    model: Any = written
    parts = isinstance(model, LLaVAModel) and args.save_format == "xtuner"
    with verify.quiet_transformers():
        if parts:
            verify_vision.check_parts(model, weights, aside)
        elif isinstance(model, LLaVAModel):
            verify_vision.check_merged_llava(model, aside, args.save_format, written_dtype)
        elif isinstance(model, InternVL_V1_5):
            verify_vision.check_internvl(model, aside, written_dtype)
        size = 2 * sum(parameter.numel() for parameter in model.parameters())
        rounds = verify.has_experts(model.llm)  # routers may choose others then
        if rounds or not (args.verify or size <= verify.AUTO_VERIFY_BYTES):
            return
        dtype = rounding(cfg, weights, written_dtype)
        if not parts and written_dtype is None and model.llm.dtype != torch.float32:
            dtype = model.llm.dtype  # as sums with the adapters are rounded
        if parts:
            section = _with_present_checkpoint(cfg.model)
            trained = BUILDER.build(section)
            trained.load_state_dict(weights.tensors, strict=False)
            expected = verify_vision.compute_logits(trained)
            del trained
            encoder = BUILDER.build(cfg.model.visual_encoder)
            again = verify_vision.read_parts(model, cfg.model.llm, encoder, aside)
            found = verify_vision.compute_logits(again)
        else:
            expected = verify_vision.compute_logits(model)
            if args.save_format == "official":
                encoder = BUILDER.build(cfg.model.visual_encoder)
                again = verify_vision.read_official(model, encoder, aside)
                found = verify_vision.compute_logits(again)
            else:
                found = verify_vision.compute_stock_logits(aside, model)
    difference = verify.compare(expected, found)
    verify.check_difference(difference, dtype, tr("the trained model"))


def _with_present_checkpoint(model: Mapping[str, Any]) -> Any:
    """The model's config; without the checkpoint of its pretraining where that is gone."""
    section: Any = copy.deepcopy(model)
    before = section.get("pretrained_pth")
    if before is not None and not Path(before).exists():
        section["pretrained_pth"] = None
    return section


def rounding(
    cfg: Config, weights: TrainedWeights, written_dtype: torch.dtype | None
) -> torch.dtype:
    """The dtype that weights or products were rounded to.

    Args:
        cfg: the config.
        weights: the checkpoint's.
        written_dtype: the dtype that was asked for.
    """
    import torch

    if (cfg.model.get("llm") or {}).get("quantization_config"):
        return torch.float16  # what the base computes in, whatever the adapter is kept in
    if written_dtype in (torch.bfloat16, torch.float16):
        return written_dtype
    dtypes = {info.dtype for info in weights.infos.values()}
    return torch.float32 if dtypes == {torch.float32} else torch.bfloat16
