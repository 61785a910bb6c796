"""Backends: implementations of one computation, of which the first that supports the case is used.

A ``Case`` says what is computed and where, a ``Backend`` declares which cases it supports, and
``choose`` takes the first of a list that does and says why the ones before it were passed over.
Nothing here looks at the machine (see ``environment``): every choice can be tested anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr

Built = TypeVar("Built")


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
    """``flash_attn.flash_attn_varlen_func``."""
    varlen_attn: LibraryFunction = LibraryFunction()
    """``torch.nn.attention.varlen.varlen_attn``."""
    liger: LibraryFunction = LibraryFunction()
    """``liger_kernel.transformers._apply_liger_kernel_to_instance``."""


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


@dataclass(frozen=True)
class Backend(Generic[Built]):
    """One implementation of a computation.

    Args:
        name: how it is called in reports.
        supports: None if it computes a case exactly, otherwise the reason why not.
        build: what computes such a case.
        device: type of the device that it is for; None for all.
    """

    name: str
    supports: Callable[[Case], str | None]
    build: Callable[[Case], Built]
    device: str | None = None


@dataclass(frozen=True)
class Choice(Generic[Built]):
    """The backend chosen for a case.

    Args:
        backend: the first that supports the case.
        case: the case.
        passed_over: those for this device that are listed before it, with the reason of each.
    """

    backend: Backend[Built]
    case: Case
    passed_over: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        return self.backend.name

    @property
    def reason(self) -> str:
        """Why it is not one of those listed before it; empty for the first."""
        return "; ".join(f"{name}: {why}" for name, why in self.passed_over)

    def build(self) -> Built:
        return self.backend.build(self.case)


def choose(backends: Sequence[Backend[Built]], case: Case) -> Choice[Built]:
    """Choose the first backend that supports a case.

    Args:
        backends: the best first.
        case: what is computed.

    Raises:
        UserError: when there is none.
    """
    passed_over: list[tuple[str, str]] = []
    for backend in backends:
        if backend.device not in (None, case.device):
            continue
        why = backend.supports(case)
        if why is None:
            return Choice(backend, case, tuple(passed_over))
        passed_over.append((backend.name, why))
    reasons = "; ".join(f"{name}: {why}" for name, why in passed_over)
    raise UserError(tr("nothing here computes this model: {reasons}", reasons=reasons))
