"""The attention function of every model: packed and padded rows, and no mask of S x S.

One function is registered with transformers' ``AttentionInterface`` under the name ``xtuner``, so
it serves every architecture that asks that interface. It finds out what kind of row and of scores a
call has, and hands it to the backend that was chosen for this kind, once in a process, from
``PACKED_BACKENDS``, ``PADDED_BACKENDS`` or ``DENSE_BACKENDS``.

* A packed row brings ``cu_seq_lens_q``; its samples do not see each other.
* Padding is given by a mask (B, T), never by one of S x S.
* Where a class lets tokens see later ones (``index_mask``), each sample has a mask of its own.
* With a ``sequence_group``, ranks exchange tokens for heads before and after, so that each of them
  computes whole rows.

Shapes: B batch, H query heads, K key heads (H is a multiple of K), S queries, T keys, D width of a
head.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from xtuner.model.backends import environment
from xtuner.model.backends.case import Case
from xtuner.model.backends.cpu import attention as cpu
from xtuner.model.backends.gpu.attention import (
    FLASH_ATTN_2,
    FLASH_ATTN_3,
    FLASH_ATTN_4,
    VARLEN_ATTN,
)
from xtuner.model.backends.gpu.flex_attention import FLEX_ATTENTION
from xtuner.model.backends.gpu.trial import try_packed_kernel
from xtuner.model.backends.interfaces import (
    AttentionOptions,
    DenseKernel,
    PackedKernel,
    Packing,
    PaddedKernel,
    padding_of,
    sample_lengths,
)
from xtuner.model.backends.registry import Backend, Choice, choose
from xtuner.model.backends.sdpa import BLOCKS, SDPA, attend_masked
from xtuner.model.modules.index_mask import IndexMask, MaskFunction, lets_see_later_tokens
from xtuner.parallel.sequence.heads import no_heads, of_own_heads, to_heads, to_tokens
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "xtuner"
PACKED_ENCODER = f"{NAME}_flash"
"""The same function, for encoders whose images share a row: transformers hands their
``cu_seq_lens_q`` to a function only if its name has "flash" in it."""
NAMES = (NAME, PACKED_ENCODER)
NOT_OF_ATTENTION = ("compiled", "distributed", "right_padded", "plain_head", "separate_head")
"""Fields of a ``Case`` that no kernel for packed rows depends on."""


def register() -> str:
    """Make the function known to transformers; return the name to ask for."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for name in NAMES:
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, _mask)
    return NAME


def use_eager(llm: PreTrainedModel) -> Callable[[], None] | None:
    """Let a model compute attention by its class's own function.

    Returns:
        What chooses the functions of before, those of encoders too; None where the class has none
        of its own.
    """
    from transformers import PreTrainedModel

    models = [module for module in llm.modules() if isinstance(module, PreTrainedModel)]
    chosen = [(model.config, model.config._attn_implementation) for model in models]
    try:
        llm.set_attn_implementation("eager")
    except ValueError:
        return None

    def undo() -> None:
        for config, name in chosen:  # the model's own first, which sets those of its parts
            config._attn_implementation = name

    return undo


def _mask(
    *_: object,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **__: object,
) -> Tensor | IndexMask | None:
    """What the function takes in place of a mask of S x S, see ``attention``."""
    if mask_function is not None and lets_see_later_tokens(mask_function):
        shape, offsets = (batch_size, q_length, kv_length), (int(q_offset), int(kv_offset))
        return IndexMask(mask_function, shape, offsets, attention_mask, device)
    return _padding_mask(kv_length, attention_mask)


def _padding_mask(kv_length: int, attention_mask: Tensor | None) -> Tensor | None:
    """The (B, T) mask as it came.

    On a CPU none where there is no padding; a GPU would have to be waited for.
    """
    if attention_mask is None or attention_mask.shape[1] == kv_length:
        mask = attention_mask
    else:
        mask = attention_mask[:, -kv_length:]
    if mask is None or mask.shape[1] < kv_length or environment.waits_for(mask.device):
        return mask
    return None if bool(mask.all()) else mask


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | IndexMask | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    s_aux: Tensor | None = None,
    sequence_group: torch.distributed.ProcessGroup | None = None,
    sequence_mask: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Compute attention; packed samples and padding do not see each other.

    Args:
        module: the layer; ``is_causal`` False on it lets tokens see those after them.
        query: (B, H, S, D).
        key: (B, K, T, D); T > S where keys of earlier tokens are cached.
        value: (B, K, T, V).
        attention_mask: (B, T), 0 where there is padding; None when there is none; an ``IndexMask``
            where tokens see later ones, which takes the place of causality and ``sliding_window``.
        scaling: factor on the scores; 1 / sqrt(D) when None.
        dropout: probability with which a weight is dropped.
        sliding_window: how many tokens, itself included, a token sees; None: all before it.
        softcap: scores are ``softcap * tanh(scores / softcap)``; None: as they are.
        is_causal: in place of the layer's own.
        cu_seq_lens_q: (samples + 1,) where the samples of a packed row begin and end; B is 1.
        max_length_q: tokens of the longest packed sample.
        s_aux: (H,) attention sinks, one more column of the softmax.
        sequence_group: the ranks that share the rows. S is then the length of this rank's shard;
            ``cu_seq_lens_q`` and ``sequence_mask`` are those of whole rows.
        sequence_mask: takes the place of ``attention_mask`` with a ``sequence_group``.

    Returns:
        (B, S, H, V), contiguous, and None in place of the weights.

    Raises:
        NotImplementedError: for an ``IndexMask`` with a ``sequence_group``, and for a mask of
            another shape, which some classes make themselves.
    """
    if isinstance(attention_mask, Tensor) and attention_mask.ndim != 2:
        shape = tuple(attention_mask.shape)
        raise NotImplementedError(f"an attention mask of {shape}, not of rows x tokens")
    query, key, value = _autocast(query, key, value)
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    options = AttentionOptions(causal, scaling, dropout, sliding_window, softcap, s_aux)
    if isinstance(attention_mask, IndexMask):
        if sequence_group is not None:
            raise NotImplementedError(tr("its mask lets tokens see later ones"))
        return _attend_masked(query, key, value, attention_mask, cu_seq_lens_q, options), None
    if sequence_group is None:
        out = _attend(query, key, value, attention_mask, cu_seq_lens_q, max_length_q, options)
        return out, None
    heads = query.shape[1]
    if s_aux is not None:
        options = options._replace(sinks=of_own_heads(s_aux, key.shape[1], sequence_group))
    query, key, value = to_heads(query, key, value, sequence_group)
    if query.shape[1]:
        out = _attend(query, key, value, sequence_mask, cu_seq_lens_q, max_length_q, options)
    else:
        out = no_heads(query, key, value, options.sinks)
    return to_tokens(out, heads, sequence_group), None


def _autocast(*tensors: Tensor) -> Sequence[Tensor]:
    """The tensors as autocast would cast them for each sample, cast once for all samples."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return [tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors]


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    options: AttentionOptions,
) -> Tensor:
    """Attention over whole rows: (B, S, H, V)."""
    if cu_seqlens is not None:
        longest = max(sample_lengths(cu_seqlens)) if max_seqlen is None else int(max_seqlen)
        packed = packed_kernel(Facts.of(query, key, value, longest, options))
        return packed(query, key, value, Packing(cu_seqlens, longest), options)
    if mask is not None:
        has_padding, right = padding_of(mask)
        if has_padding:
            facts = Facts.of(query, key, value, key.shape[2], options)
            return padded_kernel(facts, right)(query, key, value, mask, options)
    return attend_dense(query, key, value, options)


def _attend_masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: IndexMask,
    cu_seqlens: Tensor | None,
    options: AttentionOptions,
) -> Tensor:
    """Attention of whole rows, or of the samples of a packed one, by masks of their own."""
    if cu_seqlens is None:
        return attend_masked(query, key, value, mask.of_rows(), options)
    lengths = sample_lengths(cu_seqlens)
    samples = zip(*(t.split(lengths, dim=2) for t in (query, key, value)), strict=True)
    masks = mask.of_samples(lengths, options.sliding_window)
    parts = []
    for own, (q, k, v) in zip(masks, samples, strict=True):
        if own is not None:
            parts.append(attend_masked(q, k, v, own, options))
        elif q.shape[2]:
            parts.append(attend_dense(q, k, v, options))
    return torch.cat(parts, dim=1)


def attend_dense(query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
    """A ``DenseKernel``: the one chosen for rows of this kind."""
    kernel = dense_kernel(Facts.of(query, key, value, key.shape[2], options))
    return kernel(query, key, value, options)


def attend_by_sample(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, options: AttentionOptions
) -> Tensor:
    """A ``PackedKernel``: sample by sample."""
    lengths = sample_lengths(packing.cu_seqlens)
    # split, not slices: autograd would make a tensor of zeros of the whole row for each slice
    samples = zip(*(t.split(lengths, dim=2) for t in (query, key, value)), strict=True)
    return torch.cat([attend_dense(q, k, v, options) for q, k, v in samples if q.shape[2]], dim=1)


def attend_whole_rows(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, options: AttentionOptions
) -> Tensor:
    """A ``PaddedKernel`` for padding that no token sees; the output at padding means nothing."""
    return attend_dense(query, key, value, options)


def attend_by_row(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, options: AttentionOptions
) -> Tensor:
    """A ``PaddedKernel``: row by row without its padding; the output at padding is 0."""
    new = query.shape[2]
    out = query.new_zeros(query.shape[0], new, query.shape[1], value.shape[3])
    for row, tokens in enumerate(mask.bool()):
        keys = tokens.nonzero().flatten()
        queries = tokens[-new:].nonzero().flatten()  # those of the last `new` keys
        if not len(queries):
            continue
        part = attend_dense(
            query[row : row + 1][:, :, queries],
            key[row : row + 1][:, :, keys],
            value[row : row + 1][:, :, keys],
            options,
        )
        out[row, queries] = part[0].to(out.dtype)
    return out


def _unsupported_by_whole_rows(case: Case) -> str | None:
    if not case.right_padded:
        return tr("padding is not only after the last token of a row")
    if not case.causal or case.cached:
        return tr("tokens would see padding")
    return None


PACKED_BACKENDS: tuple[Backend[PackedKernel], ...] = (
    cpu.PACKED,
    FLASH_ATTN_3,
    FLASH_ATTN_4,
    FLASH_ATTN_2,
    VARLEN_ATTN,
    FLEX_ATTENTION,
    Backend("torch sdpa, sample by sample", lambda case: None, lambda case: attend_by_sample),
)
"""For packed rows, the best first."""
PADDED_BACKENDS: tuple[Backend[PaddedKernel], ...] = (
    # On a CPU, row by row costs less: nothing is computed for padding, and there is no GPU to wait
    # for when the lengths of rows are read.
    Backend(
        "whole rows", _unsupported_by_whole_rows, lambda case: attend_whole_rows, device="cuda"
    ),
    Backend("row by row", lambda case: None, lambda case: attend_by_row),
)
"""For rows with padding, likewise."""
DENSE_BACKENDS: tuple[Backend[DenseKernel], ...] = (cpu.DENSE, SDPA, BLOCKS)
"""For rows, or samples, without padding, likewise."""


class Facts(NamedTuple):
    """What a choice depends on and a call says; named as in ``Case``."""

    device: torch.device
    dtype: torch.dtype
    qk_width: int
    v_width: int
    grouped: bool
    causal: bool
    cached: bool
    single_query: bool
    sliding_window: bool
    softcap: bool
    sinks: bool
    dropout: bool
    scaled: bool

    @classmethod
    def of(
        cls, query: Tensor, key: Tensor, value: Tensor, longest: int, options: AttentionOptions
    ) -> Facts:
        """Those of a call whose longest sample, or row, has ``longest`` tokens."""
        window, scaling, width = options.sliding_window, options.scaling, query.shape[-1]
        return cls(
            device=query.device,
            dtype=query.dtype,
            qk_width=width,
            v_width=value.shape[-1],
            grouped=query.shape[1] != key.shape[1],
            causal=options.causal,
            cached=query.shape[2] != key.shape[2],
            single_query=query.shape[2] == 1,
            sliding_window=window is not None and window < longest,
            softcap=options.softcap is not None,
            sinks=options.sinks is not None,
            dropout=options.dropout > 0,
            scaled=scaling is not None and not math.isclose(scaling, width**-0.5, rel_tol=1e-6),
        )

    def case(self) -> Case:
        """The whole case: what a call says, and what this machine has."""
        found = self._asdict() | {"device": self.device.type}
        libraries, capability = environment.libraries(), environment.capability(self.device)
        return Case(libraries=libraries, capability=capability, **found)


@functools.cache
def packed_kernel(facts: Facts) -> PackedKernel:
    """What computes packed rows, chosen once for calls of a kind."""
    return packed_choice(facts.case()).build()


def packed_choice(case: Case) -> Choice[PackedKernel]:
    """The backend for packed rows; on a GPU one that was tried on a few tokens there."""
    return _packed_choice(
        replace(case, packed=True, **{name: getattr(Case, name) for name in NOT_OF_ATTENTION})
    )


@functools.cache
def _packed_choice(case: Case) -> Choice[PackedKernel]:
    if case.device != "cuda":
        return choose(PACKED_BACKENDS, case)
    return choose(
        PACKED_BACKENDS, case, functools.partial(try_packed_kernel, reference=attend_by_sample)
    )


@functools.cache
def padded_kernel(facts: Facts, right: bool) -> PaddedKernel:
    """What computes rows with padding; ``right``: it is only after the last token of each row."""
    return choose(PADDED_BACKENDS, replace(facts.case(), right_padded=right)).build()


@functools.cache
def dense_kernel(facts: Facts) -> DenseKernel:
    """What computes rows, or samples, without padding."""
    return choose(DENSE_BACKENDS, facts.case()).build()
