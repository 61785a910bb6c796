"""Comparing two models by their logits on a few fixed probe prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr

SMALL = 2 * 10**9
"""Models up to this many bytes are verified without being asked."""

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 3e-2}
"""Largest difference of logits, as a share of the largest logit, that rounding explains."""


@dataclass(frozen=True)
class Difference:
    """How far two models' logits are apart."""

    largest: float
    scale: float

    @property
    def share(self) -> float:
        return self.largest / max(self.scale, 1e-12)


def probe_ids(vocab_size: int) -> torch.Tensor:
    """Token ids ``(2, 24)`` from all over the vocabulary, the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (2, 24), generator=generator)


@torch.no_grad()
def rewards_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """A reward model's numbers ``(batch, 1)`` for whole texts, of ours or of a stock classifier."""
    model.eval()
    device = next(parameter for parameter in model.parameters() if not parameter.is_meta).device
    ids = ids.to(device)
    if hasattr(model, "llm"):
        return model({"input_ids": ids}, mode="tensor")[:, -1:].float().cpu()
    if getattr(model.config, "reward_token_id", None) is not None:
        model.config.reward_token_id = None  # the probe has none: its last token counts
    return model(input_ids=ids, use_cache=False).logits.float().cpu()


@torch.no_grad()
def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """A model's logits in fp32 on the CPU."""
    model.eval()
    device = next(parameter for parameter in model.parameters() if not parameter.is_meta).device
    output = model(input_ids=ids.to(device), use_cache=False)
    return output.logits.float().cpu()


def compare(expected: torch.Tensor, found: torch.Tensor) -> Difference:
    """The largest difference between logits of equal shape ``(batch, tokens, vocabulary)``."""
    size = min(expected.shape[-1], found.shape[-1])
    gap = (expected[..., :size] - found[..., :size]).abs().max().item()
    return Difference(gap, expected.abs().max().item())


def judge(difference: Difference, dtype: torch.dtype, what: str) -> None:
    """Say how far apart they are; refuse more than rounding to ``dtype`` explains.

    Raises:
        UserError: when it is more, or not a number.
    """
    allowed = TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])
    print(
        tr(
            "verified: largest difference of logits to {what}: {largest:.2e} "
            "(largest logit {scale:.2f})",
            what=what,
            largest=difference.largest,
            scale=difference.scale,
        )
    )
    if not difference.share <= allowed:
        raise UserError(
            tr(
                "what was written is not the same model as {what}: its logits are "
                "{largest:.3g} apart; rounding explains "
                "{allowed:.3g}.",
                what=what,
                largest=difference.largest,
                allowed=allowed * difference.scale,
            ),
            hint=tr("nothing was kept. Please report this; '--no-verify' writes it all the same."),
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and advice out of the way."""
    from transformers.utils import logging

    level, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def load_stock(folder: Path, *, classifier: bool = False, num_labels: int | None = None) -> Any:
    """Load a model as anybody would, in fp32; a classifier may get its number of labels."""
    from xtuner.model.transformers_models.auto import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
    )

    kind: Any = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    settings = {"num_labels": num_labels} if classifier and num_labels else {}
    return kind.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True, **settings)


def load_adapter(llm: Mapping[str, Any], folder: Path, *, classifier: bool = False) -> Any:
    """Load an adapter with stock peft, on its base.

    Args:
        llm: the config of the base; 4 bits are computed as in training.
        folder: the adapter.
        classifier: the base gets a head for one number (a reward), which the adapter brings.
    """
    from peft import PeftModel

    from xtuner.model.loading import build_llm
    from xtuner.model.transformers_models.auto import AutoModelForSequenceClassification

    settings = dict(llm)
    if classifier:
        loader: Any = AutoModelForSequenceClassification
        settings |= {"type": loader.from_pretrained, "num_labels": 1}
    # in fp32 before the adapter comes, whose head a base in bf16 would round
    return PeftModel.from_pretrained(to_float(build_llm(settings, full=False)), str(folder))


def to_float(model: Any) -> Any:
    """The model in fp32, unless its base is quantised."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    return model if getattr(base, "is_quantized", False) else model.float()
