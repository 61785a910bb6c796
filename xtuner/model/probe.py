"""Probing a built model with a few tokens: is it causal, and are packed and padded samples exact?

Class flags and layer names say little: architectures that mix tokens by convolutions, state spaces
or linear attention declare that they support packing, and others lose ``cu_seqlens`` on the way to
their attention. So the model itself is tried, at a run's first batch, with random token ids:

* causal: when the last token changes, earlier outputs must not;
* packed: when the first sample of a row changes, the second one's outputs must not, and each must
  equal the sample computed alone;
* padded: a shorter row of a batch must equal the row computed alone.

The gradients of the input embeddings are held to the same: what is computed from the second sample
has none in the first, and the same one in the second as when that sample is computed alone.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from xtuner.model.modules import attention
from xtuner.model.modules.packed_mixers import find_mixers, split_body, split_mixers
from xtuner.model.modules.packed_rotary import split_rotary
from xtuner.parallel.sequence.groups import get_sequence_parallel_world_size
from xtuner.utils.errors import UserError, Where, first_sentence
from xtuner.utils.lang import N_, tr, translate
from xtuner.utils.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

Forward = Callable[[Batch], Tensor]
"""A batch in, logits or hidden states (B, S, ...) out."""

PACKED = "model.use_varlen_attn"
"""What packs samples that must not attend to each other."""
LENGTHS = (7, 9)
"""Tokens of the two samples."""
DRAWS = 3
"""How often a failing check is repeated with other tokens. In a mixture of experts a rounded number
may send one token to another expert, but not in each draw."""
EXACT = 1e-5
"""Largest relative change of a token's output that counts as none."""
NOISE_FACTOR = 8.0
"""A change of up to this many times the noise counts as none, too."""
MISMATCH, ROUNDED_MISMATCH = 1e-3, 0.2
"""Largest relative difference between two ways of computing a sample, whose sums run in another
order: in float32, and where numbers are rounded more."""
ROUNDED_GRADIENT_MISMATCH = 0.5
"""The same of a gradient, whose numbers are rounded in both directions."""


@dataclass(frozen=True)
class RowProbe:
    """What a probe found: relative differences, 0 where nothing moved.

    Args:
        future: outputs before the last token, when that token changes.
        leak: outputs of a packed sample, when the sample before it changes.
        packed: a packed sample, and the same sample alone.
        padded: a padded row, and the same row alone.
        gradient_leak: the gradient in a packed sample, from the outputs of the one after it.
        gradient: the gradient in a packed or padded sample, and in the same sample alone.
        noise: outputs of a row when another row of the batch changes: only rounding moves them, as
            experts then compute other numbers of tokens together.
        rounded: whether outputs are computed in less than float32.
    """

    future: float
    leak: float = 0.0
    packed: float = 0.0
    padded: float = 0.0
    gradient_leak: float = 0.0
    gradient: float = 0.0
    noise: float = 0.0
    rounded: bool = False

    @property
    def is_causal(self) -> bool:
        return self.future <= max(EXACT, NOISE_FACTOR * self.noise)

    @property
    def packs_exactly(self) -> bool:
        moves = self.leak > max(EXACT, NOISE_FACTOR * self.noise)
        return not moves and self.packed <= self._mismatch

    @property
    def pads_exactly(self) -> bool:
        return self.padded <= self._mismatch

    @property
    def has_exact_gradients(self) -> bool:
        bound = ROUNDED_GRADIENT_MISMATCH if self.rounded else MISMATCH
        return self.gradient_leak <= EXACT and self.gradient <= bound

    @property
    def is_exact(self) -> bool:
        rows = self.packs_exactly and self.pads_exactly and self.has_exact_gradients
        return self.is_causal and rows

    @property
    def _mismatch(self) -> float:
        return ROUNDED_MISMATCH if self.rounded else MISMATCH


def ensure_exact_rows(
    llm: PreTrainedModel, forward: Forward, *, packed: bool, padded: bool
) -> None:
    """Probe a model, help it where it fails, and refuse it where that is not enough.

    Args:
        llm: the model, in evaluation mode. Layers that mix packed samples are changed to compute
            them one by one (``packed_mixers``); a model that our attention function cannot compute
            is changed to its own, ``eager``; one that still mixes packed samples is called once
            for each.
        forward: computes the outputs that the loss is made of.
        packed: rows are packed, and samples must not attend to each other.
        padded: rows are padded.

    Raises:
        UserError: with the settings to write instead.
    """
    refusal = _refusal(llm, forward, packed, padded)
    if refusal is None:
        return
    for changes in _CHANGES:
        undone = [change(llm, refusal) for change in changes]
        undo = [one for one in undone if one is not None]
        if len(undo) == len(changes) and _refusal(llm, forward, packed, padded) is None:
            for change in changes:
                logger.warning(translate(_SLOWER[change]), type(llm).__name__, refusal.message)
            return
        for one in reversed(undo):
            one()
    raise refusal


def _refusal(
    llm: PreTrainedModel, forward: Forward, packed: bool, padded: bool
) -> UserError | None:
    try:
        _ensure_exact_rows(llm, forward, packed, padded)
    except UserError as refusal:
        return refusal
    return None


@torch.no_grad()
def _ensure_exact_rows(llm: PreTrainedModel, forward: Forward, packed: bool, padded: bool) -> None:
    vocabulary = llm.config.get_text_config().vocab_size
    device = llm.device
    name = type(llm).__name__
    forward = _explained(forward)
    samples = _Samples(vocabulary, device, seed=0)
    _ensure_own_positions(llm, forward, samples.alone(samples.second))
    if packed or padded:
        split_rotary(llm)
    if packed:
        row = samples.packed(samples.first, samples.second)
        mixers = find_mixers(llm, lambda: forward(row), len(samples.first))
        if mixers:
            split_mixers(llm, mixers)
            logger.info(
                tr("%s: %d layers mix tokens (%s); they compute packed samples one by one."),
                name,
                len(mixers),
                ", ".join(sorted({mixer.rpartition(".")[2] for mixer in mixers})),
            )
    embeddings = None if is_sharded(llm) else llm.get_input_embeddings()
    found = probe_rows(
        forward, vocabulary, device, packed=packed, padded=padded, embeddings=embeddings
    )
    require_exact_rows(found, name, packed=packed)


def _ensure_own_positions(llm: PreTrainedModel, forward: Forward, batch: Batch) -> None:
    """Number positions from 0 in a batch, and as the model does by itself inside it.

    RoBERTa and its relatives begin after the index of padding.

    Raises:
        UserError: when the model numbers them in another way.
    """

    def difference() -> float:
        without: Any = {name: value for name, value in batch.items() if name != "position_ids"}
        return _difference(forward(batch), forward(without))

    if difference() <= MISMATCH:
        return
    tables = (module for module in llm.modules() if isinstance(module, nn.Embedding))
    starts = {table.padding_idx + 1 for table in tables if table.padding_idx is not None}
    for start in sorted(starts):
        handle = llm.base_model.register_forward_pre_hook(_positions_from(start), with_kwargs=True)
        if difference() <= MISMATCH:
            return
        handle.remove()
    if not math.isfinite(difference()):
        raise UserError(
            tr("{name} computes numbers that are not finite.", name=type(llm).__name__),
            hint=tr("its weights are damaged, or too large for this dtype."),
            where=Where(key="model.llm"),
        )
    raise UserError(
        tr("{name} does not take position_ids that begin with 0.", name=type(llm).__name__),
        hint=tr("it cannot be trained here."),
        where=Where(key="model.llm"),
    )


def _positions_from(start: int) -> Callable[..., Any]:
    """A hook that adds ``start`` to the ``position_ids`` of a call."""

    def shift(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        positions = kwargs.get("position_ids")
        if positions is None:
            return None
        return args, {**kwargs, "position_ids": positions + start}

    return shift


Undo = Callable[[], object]


def _use_eager_attention(llm: PreTrainedModel, refusal: UserError) -> Undo | None:
    """Change a model from our attention function to its own; None where that is not possible."""
    if llm.config._attn_implementation != attention.NAME or get_sequence_parallel_world_size() > 1:
        return None
    return attention.use_eager(llm)


def _compute_one_by_one(llm: PreTrainedModel, refusal: UserError) -> Undo | None:
    """Call a model once for each packed sample; None where that is not possible.

    Ranks that share weights would make different numbers of calls, and images have no tokens to be
    told apart by.
    """
    is_packed = refusal.where is not None and refusal.where.key == PACKED
    is_text = llm.config.get_text_config() is llm.config
    if not (is_packed and is_text) or is_sharded(llm) or get_sequence_parallel_world_size() > 1:
        return None
    undo = [split_body(module) for module in {llm: None, llm.base_model: None}]
    return lambda: [one() for one in undo]


_CHANGES = (
    (_use_eager_attention,),
    (_compute_one_by_one,),
    (_use_eager_attention, _compute_one_by_one),
)
_SLOWER = {
    _use_eager_attention: N_(
        "%s computes attention by its own function (eager), slower and with large masks: %s"
    ),
    _compute_one_by_one: N_("%s computes packed samples one by one, slower on a GPU: %s"),
}


@torch.no_grad()
def probe_rows(
    forward: Forward,
    vocabulary: int,
    device: torch.device,
    *,
    packed: bool,
    padded: bool = True,
    embeddings: nn.Module | None = None,
) -> RowProbe:
    """Probe a model.

    Args:
        forward: computes outputs; without dropout, and through the root of a sharded model: all
            ranks make the same calls.
        vocabulary: ids are drawn from its middle half, away from special tokens; the same ids on
            all ranks.
        device: where the model is.
        packed: probe packed rows (``cu_seqlens``).
        padded: probe padded rows.
        embeddings: the model's input embeddings, to probe gradients; None leaves them out.

    Returns:
        The differences of one draw; of several the least ones, where the first fails a check.

    Raises:
        UserError: when the model fails on such a batch.
    """
    forward = _explained(forward)
    gradients = None if embeddings is None else _Gradients(forward, embeddings)
    found = _probe_once(forward, _Samples(vocabulary, device, seed=0), packed, padded, gradients)
    for draw in range(1, DRAWS):
        if found.is_exact:
            break
        samples = _Samples(vocabulary, device, seed=draw)
        found = _joined(found, _probe_once(forward, samples, packed, padded, gradients))
        found = replace(found, noise=max(found.noise, _noise(forward, samples)))
    return found


def require_exact_rows(probe: RowProbe, name: str, *, packed: bool) -> None:
    """Refuse to train a model whose rows would be computed wrong.

    Args:
        probe: what was found.
        name: the model's class, for the message.
        packed: the run packs samples that must not attend to each other.

    Raises:
        UserError: with the settings to write instead.
    """
    if not probe.is_causal:
        raise UserError(
            tr(
                "{name} is not causal with this attention: earlier tokens depend on later ones "
                "(outputs change by {change:.1%}).",
                name=name,
                change=probe.future,
            ),
            hint=tr('set model.llm.attn_implementation = "eager" and use_varlen_attn = False.'),
            where=Where(key="model.llm"),
        )
    if packed and not probe.packs_exactly:
        raise UserError(
            tr(
                "packed samples are not computed separately by {name}: a sample changes by "
                "{leak:.1%} when the one before it changes, and differs by {packed:.1%} from the "
                "sample alone.",
                name=name,
                leak=probe.leak,
                packed=probe.packed,
            ),
            hint=tr("set pack_to_max_length = False and use_varlen_attn = False."),
            where=Where(key=PACKED),
        )
    if not packed and not probe.pads_exactly:
        raise UserError(
            tr(
                "padded rows are not computed exactly by {name}: a row differs by {padded:.1%} "
                "from the row alone.",
                name=name,
                padded=probe.padded,
            ),
            hint=tr('set batch_size = 1 (no padding), or model.llm.attn_implementation = "eager".'),
            where=Where(key="train_dataloader.batch_size"),
        )
    if not probe.has_exact_gradients:
        raise _inexact_gradients(probe, name, packed)


def _inexact_gradients(probe: RowProbe, name: str, packed: bool) -> UserError:
    if packed:
        return UserError(
            tr(
                "packed samples do not train separately in {name}: {leak:.1%} of a sample's "
                "gradient is in the sample before it, and it differs by {gradient:.1%} from that "
                "of the sample alone.",
                name=name,
                leak=probe.gradient_leak,
                gradient=probe.gradient,
            ),
            hint=tr("set pack_to_max_length = False and use_varlen_attn = False."),
            where=Where(key=PACKED),
        )
    return UserError(
        tr(
            "padded rows do not train exactly in {name}: a row's gradient differs by "
            "{gradient:.1%} from that of the row alone.",
            name=name,
            gradient=probe.gradient,
        ),
        hint=tr('set batch_size = 1 (no padding), or model.llm.attn_implementation = "eager".'),
        where=Where(key="train_dataloader.batch_size"),
    )


def _explained(forward: Forward) -> Forward:
    """A forward whose failure is explained: classes of transformers fail in many ways."""

    def call(batch: Batch) -> Tensor:
        try:
            outputs = forward(batch)
            if outputs.shape[:2] != batch["input_ids"].shape:
                raise ValueError(f"outputs of {tuple(outputs.shape)}")
        except UserError:
            raise
        except Exception as error:  # whatever a model's own code fails with
            raise _failed(batch, error) from error
        return outputs

    return call


def _failed(batch: Batch, error: Exception) -> UserError:
    reason = first_sentence(error)
    if "cumulative_len" in batch:
        message = tr("the model cannot compute packed rows: {error}", error=reason)
        hint = tr("set pack_to_max_length = False and use_varlen_attn = False.")
        return UserError(message, hint=hint, where=Where(key=PACKED))
    return UserError(
        tr("the model cannot compute rows with this attention: {error}", error=reason),
        hint=tr('set model.llm.attn_implementation = "eager" and use_varlen_attn = False.'),
        where=Where(key="model.llm"),
    )


class _Samples:
    """Two samples of random ids, and batches of them."""

    def __init__(self, vocabulary: int, device: torch.device, seed: int) -> None:
        self.device = device
        self.random = torch.Generator().manual_seed(seed)
        self.vocabulary = vocabulary
        self.first, self.second = (self.draw(length) for length in LENGTHS)

    def draw(self, length: int) -> Tensor:
        low, high = self.vocabulary // 4, self.vocabulary * 3 // 4
        return torch.randint(low, high, (length,), generator=self.random)

    def alone(self, ids: Tensor) -> Batch:
        return {
            "input_ids": ids[None].to(self.device),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.long, device=self.device),
            "position_ids": torch.arange(len(ids), device=self.device)[None],
        }

    def packed(self, *samples: Tensor) -> Batch:
        lengths = torch.tensor([len(ids) for ids in samples])
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
        return {
            "input_ids": torch.cat(samples)[None].to(self.device),
            "position_ids": torch.cat([torch.arange(int(n)) for n in lengths])[None].to(
                self.device
            ),
            "cumulative_len": [cu_seqlens.to(self.device)],
            "max_seqlen": int(lengths.max()),
        }

    def batch(self, short: Tensor, long: Tensor) -> Batch:
        """Two rows, the shorter one padded at its end."""
        missing = len(long) - len(short)
        ids = torch.stack([torch.cat([short, short.new_zeros(missing)]), long])
        mask = torch.ones_like(ids)
        mask[0, len(short) :] = 0
        positions = torch.arange(len(long)).expand(2, -1).clone()
        batch: Batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        for name in ("input_ids", "attention_mask", "position_ids"):
            batch[name] = batch[name].to(self.device)
        return batch


class _Gradients:
    """Gradients of the input embeddings.

    Args:
        forward: computes outputs.
        embeddings: the module that ``forward`` calls first.
    """

    def __init__(self, forward: Forward, embeddings: nn.Module) -> None:
        self.forward, self.embeddings = forward, embeddings

    def of(self, batch: Batch, row: int, tokens: slice) -> Tensor:
        """The gradient (B, S, H) of a fixed random sum of the outputs of some tokens of a row.

        Weights get none, and no memory is taken for theirs. Zeros where no embedding was called.
        """
        inputs: list[Tensor] = []

        def cut(module: nn.Module, args: object, output: Tensor) -> Tensor:
            inputs.append(output.detach().requires_grad_())
            return inputs[-1].clone()  # which the model may change in place

        handle = self.embeddings.register_forward_hook(cut)
        try:
            with torch.enable_grad():
                outputs = self.forward(batch)[row, tokens].float()
                random = torch.Generator().manual_seed(0)
                factors = torch.randn(outputs.shape, generator=random).to(outputs.device)
                if not inputs:
                    return torch.zeros_like(outputs)[None]
                if sum(each.shape[1] for each in inputs) != batch["input_ids"].shape[1]:
                    del inputs[1:]  # called for the whole row more than once
                loss = (outputs * factors).sum()
                found = torch.autograd.grad(loss, inputs, materialize_grads=True)
        except RuntimeError as error:
            raise _failed(batch, error) from error
        finally:
            handle.remove()
        return torch.cat(found, dim=1)

    def packed(self, samples: _Samples) -> tuple[float, float]:
        """``RowProbe.gradient_leak`` and ``gradient`` of a packed row."""
        boundary = len(samples.first)
        tokens = slice(boundary, None)
        found = self.of(samples.packed(samples.first, samples.second), 0, tokens)
        alone = self.of(samples.alone(samples.second), 0, slice(None))
        norm = alone.float().norm().clamp_min(1e-12)
        leak = _number(found[:, :boundary].float().norm() / norm)
        return leak, _difference(found[:, boundary:], alone)

    def padded(self, samples: _Samples) -> float:
        """``RowProbe.gradient`` of the shorter row of a padded batch."""
        tokens = slice(len(samples.first))
        found = self.of(samples.batch(samples.first, samples.second), 0, tokens)
        return _difference(found[:1, tokens], self.of(samples.alone(samples.first), 0, tokens))


def is_sharded(llm: nn.Module) -> bool:
    """Whether ranks share each weight (ZeRO-3, FSDP): a backward pass is theirs alone to order."""
    return any(hasattr(w, "ds_id") or isinstance(w, DTensor) for w in llm.parameters())


def _probe_once(
    forward: Forward,
    samples: _Samples,
    packed: bool,
    padded: bool,
    gradients: _Gradients | None,
) -> RowProbe:
    first, second = samples.first, samples.second
    alone = forward(samples.alone(second))
    changed = second.clone()
    changed[-1] = samples.vocabulary - changed[-1]
    future = _change(forward(samples.alone(changed))[:, :-1], alone[:, :-1])
    leak = apart = beside_padding = gradient_leak = gradient = 0.0
    if packed:
        row = forward(samples.packed(first, second))
        other = forward(samples.packed(samples.draw(len(first)), second))
        leak = _change(other[:, len(first) :], row[:, len(first) :])
        apart = max(
            _difference(row[:, len(first) :], alone),
            _difference(row[:, : len(first)], forward(samples.alone(first))),
        )
    if padded:
        batch = forward(samples.batch(first, second))
        beside_padding = max(
            _difference(batch[:1, : len(first)], forward(samples.alone(first))),
            _difference(batch[1:], alone),
        )
    if gradients is not None and packed:
        gradient_leak, gradient = gradients.packed(samples)
    if gradients is not None and padded:
        gradient = max(gradient, gradients.padded(samples))
    rounded = alone.dtype != torch.float32 or torch.is_autocast_enabled(alone.device.type)
    return RowProbe(future, leak, apart, beside_padding, gradient_leak, gradient, rounded=rounded)


def _noise(forward: Forward, samples: _Samples) -> float:
    length = len(samples.second)
    one, other = (
        forward(samples.batch(samples.second, samples.draw(length)))[:1] for _ in range(2)
    )
    return _change(one, other)


def _joined(one: RowProbe, other: RowProbe) -> RowProbe:
    """The least of two draws."""
    return RowProbe(
        future=min(one.future, other.future),
        leak=min(one.leak, other.leak),
        packed=min(one.packed, other.packed),
        padded=min(one.padded, other.padded),
        gradient_leak=min(one.gradient_leak, other.gradient_leak),
        gradient=min(one.gradient, other.gradient),
        noise=max(one.noise, other.noise),
        rounded=one.rounded,
    )


def _change(outputs: Tensor, before: Tensor) -> float:
    """The largest relative change of a token's output: (1, S, D) each."""
    moved = (outputs.float() - before.float()).norm(dim=-1)
    return _number((moved / before.float().norm(dim=-1).clamp_min(1e-12)).amax())


def _difference(outputs: Tensor, wanted: Tensor) -> float:
    """The relative difference of all outputs of a sample: (1, S, D) each, infinite if not so."""
    if outputs.shape != wanted.shape:
        return math.inf
    return _number(
        (outputs.float() - wanted.float()).norm() / wanted.float().norm().clamp_min(1e-12)
    )


def _number(value: Tensor) -> float:
    """A float; infinite where the outputs are not finite."""
    return float(torch.nan_to_num(value, nan=torch.inf))
