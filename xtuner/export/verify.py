"""Verification of exported models: their logits on fixed prompts against the trained model's."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from xtuner.export.weights import Weights, shown
from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from xtuner.export.trained_weights import TrainedWeights

AUTO_VERIFY_BYTES = 2 * 10**9
"""Models up to this many bytes are verified by default."""

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 3e-2}
"""Largest difference of logits that rounding explains, as a fraction of the largest logit."""

ROUNDINGS = 4
"""How often a written weight may have been rounded: the base, the adapter's product, their sum."""


@dataclass(frozen=True)
class Difference:
    """The difference of two models' logits.

    Attributes:
        largest: absolute difference of any two logits.
        scale: the largest absolute logit.
    """

    largest: float
    scale: float

    @property
    def relative(self) -> float:
        return self.largest / max(self.scale, 1e-12)


def probe_ids(vocab_size: int) -> torch.Tensor:
    """Token ids ``(2, 24)`` drawn from the vocabulary, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (2, 24), generator=generator)


@torch.no_grad()
def compute_rewards(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The rewards ``(batch, 1)`` of ids ``(batch, tokens)``, by our model or a classifier."""
    model.eval()
    device = next(parameter for parameter in model.parameters() if not parameter.is_meta).device
    ids = ids.to(device)
    if hasattr(model, "llm"):
        rewards: torch.Tensor = model({"input_ids": ids}, mode="tensor")[:, -1:]
        return rewards.float().cpu()
    config: Any = model.config
    if getattr(config, "reward_token_id", None) is not None:
        config.reward_token_id = None  # the probe has none: its last token counts
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float().cpu()


@torch.no_grad()
def compute_logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The logits ``(batch, tokens, vocabulary)`` of ids ``(batch, tokens)``, fp32 on the CPU."""
    model.eval()
    device = next(parameter for parameter in model.parameters() if not parameter.is_meta).device
    logits: torch.Tensor = model(input_ids=ids.to(device), use_cache=False).logits
    return logits.float().cpu()


def compare(expected: torch.Tensor, found: torch.Tensor) -> Difference:
    """Compare logits ``(batch, tokens, vocabulary)``; a padded vocabulary is cut to the smaller."""
    size = min(expected.shape[-1], found.shape[-1])
    gap = (expected[..., :size] - found[..., :size]).abs().max().item()
    return Difference(gap, expected.abs().max().item())


def check_difference(difference: Difference, dtype: torch.dtype, what: str) -> None:
    """Print a difference, and check that rounding to ``dtype`` explains it.

    Args:
        difference: of the logits.
        dtype: that weights or products were rounded to.
        what: the expected model, for the message.

    Raises:
        UserError: when it is larger, or not a number.
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
    if not difference.relative <= allowed:
        raise UserError(
            tr(
                "what was written is not the same model as {what}: its logits are "
                "{largest:.3g} apart; rounding explains "
                "{allowed:.3g}.",
                what=what,
                largest=difference.largest,
                allowed=allowed * difference.scale,
            ),
            hint=_hint(),
        )


def _hint() -> str:
    return tr("nothing was written. Please report this; '--no-verify' skips the check.")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def has_experts(model: nn.Module) -> bool:
    """Whether a model routes tokens to experts: rounding can change its logits abruptly."""
    from xtuner.model.lora.targets import EXPERTS

    return any(
        name.rpartition(".")[2] == EXPERTS or "Expert" in type(module).__name__
        for name, module in model.named_modules()
    )


def untie(model: PreTrainedModel) -> None:
    """Give the head of a model a weight of its own, if it shares the embedding's."""
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    if head is not None and head.weight is embedding.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())


def own_weights(model: nn.Module, copy: bool = True) -> dict[str, torch.Tensor]:
    """The weights that an export of a model writes: all, or an adapter's."""
    from peft import PeftModel, get_peft_model_state_dict

    adapted = isinstance(model, PeftModel)
    state = get_peft_model_state_dict(model) if adapted else model.state_dict()
    return {name: tensor.detach().clone() if copy else tensor for name, tensor in state.items()}


class StoredWeights(Mapping[str, torch.Tensor]):
    """Weights of a folder or file, each read when it is asked for.

    Args:
        weights: the files, or a checkpoint.
        names: the names asked for -> those in the files.
    """

    def __init__(self, weights: Weights | TrainedWeights, names: Mapping[str, str]) -> None:
        self.weights, self.names = weights, names

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.weights.read(self.names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def stored_weights(exact: Mapping[str, torch.Tensor], weights: Weights) -> StoredWeights | None:
    """The weights of a model as files have them, without a second model in memory.

    Args:
        exact: the model's weights; those that are tied share their memory.
        weights: the files.

    Returns:
        None where the files have other names, as for experts that transformers joins.
    """
    names = {name: name for name in exact if name in weights.infos}
    shared = {exact[name].data_ptr(): name for name in names}
    for name, tensor in exact.items():
        if name not in names and tensor.data_ptr() in shared:
            names[name] = shared[tensor.data_ptr()]
    return StoredWeights(weights, names) if names.keys() == exact.keys() else None


def check_stored_weights(
    exact: Mapping[str, torch.Tensor],
    folder: Path,
    dtype: torch.dtype,
    base: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Check the written weights of a model number by number, where files and model name them alike.

    Logits alone would let a small mistake in one layer pass as rounding.

    Args:
        exact: the expected weights in fp32.
        folder: what was written, or its file.
        dtype: that they were rounded to.
        base: the weights before a merge.

    Raises:
        UserError: naming the weights that rounding does not explain.
    """
    found = stored_weights(exact, Weights(folder))
    if found is not None:
        check_weights(exact, found, dtype, base)
        _say_verified(dtype)


def _say_verified(dtype: torch.dtype) -> None:
    print(tr("verified: each weight is the expected one, rounded to {dtype}", dtype=_name(dtype)))


def check_weights(
    exact: Mapping[str, torch.Tensor],
    found: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    base: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Check that weights are others rounded to a dtype, number by number.

    Args:
        exact: the expected weights in fp32.
        found: the written weights, of the same names and shapes.
        dtype: that they were rounded to.
        base: the weights before a merge, whose rounding counts too.

    Raises:
        UserError: naming the weights that rounding does not explain.
    """
    wrong = sorted(exact.keys() ^ found.keys())
    step = ROUNDINGS * max(torch.finfo(dtype).eps, 1e-6)
    for name in exact.keys() & found.keys():
        whole, written = exact[name].float(), found[name].float()
        if whole.shape != written.shape:
            wrong.append(name)
            continue
        size = whole.abs()
        before = base[name] if base is not None and name in base else None
        if before is not None and before.shape == whole.shape:  # a vocabulary may have grown
            size = size + before.float().abs()
        noise = 1e-6 * whole.abs().max() if whole.numel() else 0.0  # of sums in another order
        if not ((whole - written).abs() <= step * size + noise).all():
            wrong.append(name)
    if wrong:
        raise UserError(
            tr(
                "these weights are not those of the expected model, rounded to {dtype}: {names}",
                dtype=_name(dtype),
                names=shown(sorted(wrong), 4),
            ),
            hint=_hint(),
        )


def check_tensor(
    name: str,
    expected: torch.Tensor | None,
    found: torch.Tensor,
    before: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Compare a tensor; what no arithmetic was done on must be the same, to the bit, when cast.

    Args:
        name: of the tensor, for the message.
        expected: the exact one; None where there must be none.
        found: the written one.
        before: the base's, where an adapter was added to it.
        dtype: that the sum was rounded to; that of ``found`` when None.

    Raises:
        UserError: when rounding does not explain the difference.
    """
    if expected is not None and before is None:
        if torch.equal(expected.to(found.dtype), found):
            return
        expected = None
    rounded = dtype or (found.dtype if found.dtype.is_floating_point else torch.float32)
    wanted = {} if expected is None else {name: expected}
    check_weights(wanted, {name: found}, rounded, {} if before is None else {name: before})


def check_experts(
    model: nn.Module,
    exact: Mapping[str, torch.Tensor],
    difference: Callable[[nn.Module], Difference],
    dtype: torch.dtype,
    what: str,
    base: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Check a written mixture of experts, whose routers may choose others after rounding.

    Logits on the probe would refuse a right one, and a wrong expert that no token chooses would
    pass. So each weight must be the exact one rounded, and with the exact weights the logits must
    agree in fp32.

    Args:
        model: as loaded from what was written, in fp32; it gets the exact weights.
        exact: the weights before rounding, as ``own_weights`` has them.
        difference: of a model's logits to the expected ones.
        dtype: that weights were rounded to.
        what: the expected model, for the message.
        base: the weights before a merge.

    Raises:
        UserError: when weights or logits are others.
    """
    from peft import PeftModel, set_peft_model_state_dict

    check_weights(exact, own_weights(model), dtype, base)
    _say_verified(dtype)
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, dict(exact))
    else:
        model.load_state_dict(exact)
    quantised = getattr(getattr(model, "get_base_model", lambda: model)(), "is_quantized", False)
    check_difference(difference(model), dtype if quantised else torch.float32, what)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and warnings."""
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


def load_with_transformers(
    folder: Path,
    *,
    classifier: bool = False,
    num_labels: int | None = None,
    auto_class: Any = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load a model with transformers alone, in fp32.

    Args:
        folder: the model.
        classifier: as a sequence classifier.
        num_labels: of a classifier, where its config does not say.
        auto_class: of another model; ``AutoModelForCausalLM`` when None.
        trust_remote_code: whether code of the folder may run.
    """
    from xtuner.model.remote_code import load_pretrained
    from xtuner.model.transformers_models.auto import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
    )

    kind: Any = auto_class or AutoModelForCausalLM
    kind = AutoModelForSequenceClassification if classifier else kind
    settings: dict[str, Any] = {"num_labels": num_labels} if classifier and num_labels else {}
    return load_pretrained(kind, folder, trusted=trust_remote_code, dtype=torch.float32, **settings)


def load_with_peft(llm: Mapping[str, Any], folder: Path, *, classifier: bool = False) -> Any:
    """Load an adapter with peft on its base.

    Args:
        llm: the config of the base; a 4-bit base is quantised as in training.
        folder: the adapter.
        classifier: the base gets a head with one label (a reward), whose weights the adapter has.
    """
    from xtuner.export.streaming_merge import read_adapter, resize_embeddings
    from xtuner.model.loading import build_llm
    from xtuner.model.lora.adapter_files import load_adapter
    from xtuner.model.transformers_models.auto import AutoModelForSequenceClassification

    settings = dict(llm)
    if classifier:
        loader: Any = AutoModelForSequenceClassification
        settings |= {"type": loader.from_pretrained, "num_labels": 1}
    # fp32 before the adapter is loaded: a base in bf16 would round its head
    base: Any = to_fp32(build_llm(settings, full=False))
    resize_embeddings(base, read_adapter(folder))
    return load_adapter(base, folder)


def to_fp32(model: nn.Module) -> nn.Module:
    """The model in fp32, unless its base is quantised."""
    base: nn.Module = getattr(model, "get_base_model", lambda: model)()
    return model if getattr(base, "is_quantized", False) else model.float()
