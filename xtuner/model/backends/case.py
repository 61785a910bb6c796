"""What is computed and where: what backends declare that they support, or not."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

AMPERE = (8, 0)
"""The compute capability from which on GPUs have bfloat16 and the kernels of flash attention."""


@dataclass(frozen=True)
class LibraryFunction:
    """A function of an optional library.

    Args:
        error: why it cannot be called; empty when it can.
        keywords: the names of its parameters.
    """

    error: str = "not installed"
    keywords: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Libraries:
    """What the installed libraries offer."""

    flash_attn: LibraryFunction = LibraryFunction()
    """``flash_attn.flash_attn_varlen_func`` of flash-attn 2."""
    varlen_attn: LibraryFunction = LibraryFunction()
    """``torch.nn.attention.varlen.varlen_attn``."""
    liger: LibraryFunction = LibraryFunction()
    """``liger_kernel.transformers._apply_liger_kernel_to_instance``."""
    flash_attn_3: LibraryFunction = LibraryFunction()
    """``flash_attn_interface.flash_attn_varlen_func`` of flash-attn 3."""
    flash_attn_4: LibraryFunction = LibraryFunction()
    """``flash_attn.cute.flash_attn_varlen_func`` of flash-attn 4."""
    flex_attention: LibraryFunction = LibraryFunction()
    """``torch.nn.attention.flex_attention.flex_attention``."""


@dataclass(frozen=True)
class Case:
    """What is computed, and where.

    Args:
        device: type of the device.
        capability: compute capability of a CUDA device, such as (8, 0).
        dtype: what matrix products are computed in.
        libraries: what the installed libraries offer.
        compiled: whether torch.compile is used (on a CPU for element-wise kernels, on a GPU for
            whole layers).
        distributed: whether several processes train.
        qk_width: width of a head of queries and keys.
        v_width: width of a head of values.
        grouped: several heads of the queries share one of the keys.
        causal: a token does not see those after it.
        packed: samples of one row do not see each other.
        right_padded: the padding of rows, if any, is only after their last token.
        cached: there are more keys than queries: those of tokens computed before.
        single_query: there is one query for each head.
        sliding_window: a token does not see all those before it.
        softcap: scores are bounded by a tanh.
        sinks: the softmax has one more column, a learned score that no value belongs to.
        dropout: some attention weights are dropped at random.
        scaled: the factor on the scores is another than 1 / sqrt(qk_width).
        plain_head: the output layer is linear, without bias or adapter.
        separate_head: body and output layer can be called apart.
    """

    device: str = "cpu"
    capability: tuple[int, int] | None = None
    dtype: torch.dtype = torch.bfloat16
    libraries: Libraries = field(default_factory=Libraries)
    compiled: bool = False
    distributed: bool = False
    qk_width: int = 64
    v_width: int = 64
    grouped: bool = False
    causal: bool = True
    packed: bool = False
    right_padded: bool = False
    cached: bool = False
    single_query: bool = False
    sliding_window: bool = False
    softcap: bool = False
    sinks: bool = False
    dropout: bool = False
    scaled: bool = False
    plain_head: bool = True
    separate_head: bool = True

    @property
    def is_half(self) -> bool:
        """Whether products are computed in 16 bits."""
        return self.dtype in (torch.float16, torch.bfloat16)
