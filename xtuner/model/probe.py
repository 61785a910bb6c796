"""Probing a built model with a few tokens: is it causal, and are packed and padded samples exact?

Class flags and layer names say little: architectures that mix tokens by convolutions, state spaces
or linear attention declare that they support packing, and others lose ``cu_seqlens`` on the way to
their attention. So the model itself is tried, at a run's first batch, with random token ids:

* causal: when the last token changes, earlier outputs must not;
* packed: when the first sample of a row changes, the second one's outputs must not, and each must
  equal the sample computed alone;
* padded: a shorter row of a batch must equal the row computed alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xtuner.model.modules import attention
from xtuner.model.modules.packed_mixers import find_mixers, split_mixers
from xtuner.model.modules.packed_rotary import split_rotary
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr
from xtuner.utils.types import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

Forward = Callable[[Batch], Tensor]
"""A batch in, logits or hidden states (B, S, ...) out."""

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


@dataclass(frozen=True)
class RowProbe:
    """What a probe found: relative differences, 0 where nothing moved.

    Args:
        future: outputs before the last token, when that token changes.
        leak: outputs of a packed sample, when the sample before it changes.
        packed: a packed sample, and the same sample alone.
        padded: a padded row, and the same row alone.
        noise: outputs of a row when another row of the batch changes: only rounding moves them, as
            experts then compute other numbers of tokens together.
        rounded: whether outputs are computed in less than float32.
    """

    future: float
    leak: float = 0.0
    packed: float = 0.0
    padded: float = 0.0
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
    def is_exact(self) -> bool:
        return self.is_causal and self.packs_exactly and self.pads_exactly

    @property
    def _mismatch(self) -> float:
        return ROUNDED_MISMATCH if self.rounded else MISMATCH


@torch.no_grad()
def ensure_exact_rows(
    llm: PreTrainedModel, forward: Forward, *, packed: bool, padded: bool
) -> None:
    """Probe a model, help it where packed samples mix, and refuse it where that is not enough.

    Args:
        llm: the model, in evaluation mode; layers that mix packed samples are changed to compute
            them one by one (``packed_mixers``).
        forward: computes the outputs that the loss is made of.
        packed: rows are packed, and samples must not attend to each other.
        padded: rows are padded.

    Raises:
        UserError: with the settings to write instead.
    """
    vocabulary = llm.config.get_text_config().vocab_size
    device = llm.device
    name = type(llm).__name__
    forward = _explained(forward)
    if packed or padded:
        split_rotary(llm)
    if packed:
        samples = _Samples(vocabulary, device, seed=0)
        row = samples.packed(samples.first, samples.second)
        mixers = find_mixers(llm, lambda: forward(row), len(samples.first))
        if mixers:
            split_mixers(llm, mixers)
            logger.info(
                "%s: %d layers mix tokens without cu_seqlens (%s); they compute packed samples one "
                "by one.",
                name,
                len(mixers),
                ", ".join(sorted({mixer.rpartition(".")[2] for mixer in mixers})),
            )
    found = probe_rows(forward, vocabulary, device, packed=packed, padded=padded)
    require_exact_rows(found, name, packed=packed)


@torch.no_grad()
def probe_rows(
    forward: Forward,
    vocabulary: int,
    device: torch.device,
    *,
    packed: bool,
    padded: bool = True,
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

    Returns:
        The differences of one draw; of several the least ones, where the first fails a check.

    Raises:
        UserError: when the model fails on such a batch.
    """
    forward = _explained(forward)
    found = _probe_once(forward, _Samples(vocabulary, device, seed=0), packed, padded)
    for draw in range(1, DRAWS):
        if found.is_exact:
            break
        samples = _Samples(vocabulary, device, seed=draw)
        found = _joined(found, _probe_once(forward, samples, packed, padded))
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
            where=Where(key="model.use_varlen_attn"),
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


def require_within_chunks(llm: PreTrainedModel, tokens: int) -> None:
    """Refuse samples longer than the chunks of a model with chunked attention (Llama 4).

    Our attention function computes its chunked layers as full attention: the same within a chunk.

    Args:
        llm: the model.
        tokens: of the longest sample.

    Raises:
        UserError: with the settings to write instead.
    """
    config = llm.config.get_text_config()
    chunk = getattr(config, "attention_chunk_size", None)
    chunked = "chunked_attention" in (getattr(config, "layer_types", None) or ())
    if chunk is None or not chunked or tokens <= chunk:
        return
    if llm.config._attn_implementation != attention.NAME:
        return
    raise UserError(
        tr(
            "{name} attends in chunks of {chunk} tokens, and a sample has {tokens}.",
            name=type(llm).__name__,
            chunk=chunk,
            tokens=tokens,
        ),
        hint=tr(
            'set max_length to {chunk}, or model.llm.attn_implementation = "eager" and '
            "use_varlen_attn = False.",
            chunk=chunk,
        ),
        where=Where(key="max_length"),
    )


def _explained(forward: Forward) -> Forward:
    """A forward whose failure is explained: classes of transformers fail in many ways."""

    def call(batch: Batch) -> Tensor:
        try:
            return forward(batch)
        except UserError:
            raise
        except Exception as error:  # whatever a model's own code fails with
            raise _failed(batch, error) from error

    return call


def _failed(batch: Batch, error: Exception) -> UserError:
    first_line = str(error).partition("\n")[0]
    if "cumulative_len" in batch:
        message = tr("the model cannot compute packed rows: {error}", error=first_line)
        hint = tr("set pack_to_max_length = False and use_varlen_attn = False.")
        return UserError(message, hint=hint, where=Where(key="model.use_varlen_attn"))
    return UserError(
        tr("the model cannot compute rows with this attention: {error}", error=first_line),
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


def _probe_once(forward: Forward, samples: _Samples, packed: bool, padded: bool) -> RowProbe:
    first, second = samples.first, samples.second
    alone = forward(samples.alone(second))
    changed = second.clone()
    changed[-1] = samples.vocabulary - changed[-1]
    future = _change(forward(samples.alone(changed))[:, :-1], alone[:, :-1])
    leak = apart = beside_padding = 0.0
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
    rounded = alone.dtype != torch.float32 or torch.is_autocast_enabled(alone.device.type)
    return RowProbe(future, leak, apart, beside_padding, rounded=rounded)


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
        noise=max(one.noise, other.noise),
        rounded=one.rounded,
    )


def _change(outputs: Tensor, before: Tensor) -> float:
    """The largest relative change of a token's output: (1, S, D) each."""
    moved = (outputs.float() - before.float()).norm(dim=-1)
    return _number((moved / before.float().norm(dim=-1).clamp_min(1e-12)).amax())


def _difference(outputs: Tensor, wanted: Tensor) -> float:
    """The relative difference of all outputs of a sample: (1, S, D) each."""
    return _number(
        (outputs.float() - wanted.float()).norm() / wanted.float().norm().clamp_min(1e-12)
    )


def _number(value: Tensor) -> float:
    """A float; infinite where the outputs are not finite."""
    return float(torch.nan_to_num(value, nan=torch.inf))
