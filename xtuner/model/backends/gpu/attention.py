"""Attention over the samples of a packed row by one kernel, on a GPU.

These kernels want heads of one width, a multiple of 8, for queries, keys and values: narrower ones
are padded with zeros, which change no score, and the output is cropped.

Shapes: T tokens of the row, H query heads, K key heads, D width of a head of queries and keys, V of
values.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

from xtuner.model.backends import environment
from xtuner.model.backends.case import AMPERE, Case, LibraryFunction
from xtuner.model.backends.interfaces import AttentionOptions, PackedKernel, Packing
from xtuner.model.backends.registry import Backend
from xtuner.utils.lang import tr

WIDTH_STEP, MAX_WIDTH = 8, 256
"""Widths of a head that the kernels have: multiples of 8, up to this."""
SMALL_SHARED_MEMORY = {(8, 6), (8, 9), (12, 0), (12, 1)}
"""Compute capabilities on which the widest heads have no backward pass, ..."""
NARROW = 192
"""... those wider than this."""


@dataclass(frozen=True)
class FlashAttention:
    """A version of Dao-AILab's flash-attn.

    The versions are packages of their own. Their functions take the same keywords as far as they
    have them; releases differ in which they have.

    Args:
        library: the field of ``Libraries``.
        generations: of the GPUs that it is written for: first numbers of compute capabilities.
        unlimited: what it takes for a side of the window without a limit.
    """

    library: str
    generations: tuple[int, ...]
    unlimited: int | None = -1

    def function_of(self, case: Case) -> LibraryFunction:
        """What the installed release offers."""
        found: LibraryFunction = getattr(case.libraries, self.library)
        return found

    def kernel(self, case: Case) -> PackedKernel:
        """What computes such a case."""
        function = environment.function(self.library)
        keywords = self.function_of(case).keywords

        def attend(
            query: Tensor, key: Tensor, value: Tensor, packing: Packing, options: AttentionOptions
        ) -> Tensor:
            cu_seqlens, longest = packing
            settings = {
                "softmax_scale": query.shape[-1] ** -0.5
                if options.scaling is None
                else options.scaling,
                "causal": options.causal,
                "window_size": tuple(self.unlimited if n < 0 else n for n in options.window),
                "softcap": options.softcap or 0.0,
                "dropout_p": options.dropout,
                "learnable_sink": options.sinks,
            }
            width = _padded_width(query.shape[-1], value.shape[-1])
            result = function(
                *_tokens_first(query, key, value, width),
                cu_seqlens_q=cu_seqlens,
                cu_seqlens_k=cu_seqlens,
                max_seqlen_q=longest,
                max_seqlen_k=longest,
                **{name: setting for name, setting in settings.items() if name in keywords},
            )
            # some releases return the log-sum-exps as well
            out: Tensor = result[0] if isinstance(result, tuple) else result
            return _cropped(out, value.shape[-1])

        return attend

    def unsupported(self, case: Case) -> str | None:
        """Why it does not compute a case."""
        library = self.function_of(case)
        if library.error:
            return library.error
        why = _unsupported_by_all(case)
        if why is not None:
            return why
        if case.capability is not None and case.capability[0] not in self.generations:
            return tr(
                "it is not for compute capability {major}.{minor}",
                major=case.capability[0],
                minor=case.capability[1],
            )
        if case.sinks and "learnable_sink" not in library.keywords:
            return tr("it has no attention sinks")
        if case.dropout and "dropout_p" not in library.keywords:
            return tr("it has no dropout")
        needed = {"softcap": case.softcap, "window_size": case.sliding_window}
        for keyword, is_needed in needed.items():
            if is_needed and keyword not in library.keywords:
                return tr("this version has no {keyword}", keyword=keyword)
        if case.dropout and _lacks_shared_memory(case):
            return tr("heads wider than {most} have no backward pass on this GPU", most=NARROW)
        return None


def varlen_attn_kernel(case: Case) -> PackedKernel:
    """torch's own kernel, from torch 2.10 on; its parameters differ between versions."""
    function = environment.function("varlen_attn")
    keywords = case.libraries.varlen_attn.keywords

    def attend(
        query: Tensor, key: Tensor, value: Tensor, packing: Packing, options: AttentionOptions
    ) -> Tensor:
        further: dict[str, object] = {}
        if "scale" in keywords:
            own = query.shape[-1] ** -0.5
            further["scale"] = own if options.scaling is None else options.scaling
        if "window_size" in keywords:
            further["window_size"] = options.window
        else:
            further["is_causal"] = options.causal
        groups = query.shape[1] // key.shape[1]
        if "enable_gqa" in keywords:
            further["enable_gqa"] = groups > 1
        elif groups > 1:
            key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        width = _padded_width(query.shape[-1], value.shape[-1])
        cu_seqlens, longest = packing
        out: Tensor = function(
            *_tokens_first(query, key, value, width),
            cu_seqlens,
            cu_seqlens,
            longest,
            longest,
            **further,
        )
        return _cropped(out, value.shape[-1])

    return attend


def _tokens_first(query: Tensor, key: Tensor, value: Tensor, width: int) -> list[Tensor]:
    """(1, H, T, D) -> (T, H, width) each, zeros behind D."""
    return [
        pad(tensor[0].transpose(0, 1), (0, width - tensor.shape[-1]))
        if tensor.shape[-1] < width
        else tensor[0].transpose(0, 1)
        for tensor in (query, key, value)
    ]


def _cropped(out: Tensor, width: int) -> Tensor:
    """(T, H, width or more) -> (1, T, H, width), contiguous whatever the kernel makes."""
    return out[None, ..., :width].contiguous()


def _padded_width(qk_width: int, v_width: int) -> int:
    return -(-max(qk_width, v_width) // WIDTH_STEP) * WIDTH_STEP


def _unsupported_by_all(case: Case) -> str | None:
    """What no such kernel computes."""
    if case.capability is None or case.capability < AMPERE:
        return tr("it needs compute capability 8.0 or higher")
    if not case.is_half:
        return tr("it needs float16 or bfloat16")
    if case.cached:
        return tr("it has no cached keys")
    if _padded_width(case.qk_width, case.v_width) > MAX_WIDTH:
        return tr("heads are wider than {most}", most=MAX_WIDTH)
    return None


def _unsupported_by_varlen_attn(case: Case) -> str | None:
    library = case.libraries.varlen_attn
    if library.error:
        return library.error
    why = _unsupported_by_all(case)
    if why is not None:
        return why
    if case.sinks:
        return tr("it has no attention sinks")
    if case.dropout:
        return tr("it has no dropout")
    if case.softcap:
        return tr("it has no soft cap")
    if case.sliding_window and "window_size" not in library.keywords:
        return tr("this version has no {keyword}", keyword="window_size")
    padded = _padded_width(case.qk_width, case.v_width) != case.qk_width
    if (case.scaled or padded) and "scale" not in library.keywords:
        return tr("this version has no {keyword}", keyword="scale")
    if _lacks_shared_memory(case):
        return tr("heads wider than {most} have no backward pass on this GPU", most=NARROW)
    return None


def _lacks_shared_memory(case: Case) -> bool:
    width = _padded_width(case.qk_width, case.v_width)
    return case.capability in SMALL_SHARED_MEMORY and width > NARROW


def _backend(name: str, version: FlashAttention) -> Backend[PackedKernel]:
    return Backend(name, version.unsupported, version.kernel, device="cuda")


FLASH_ATTN_2 = _backend("flash-attn", FlashAttention("flash_attn", (8, 9, 10, 11, 12)))
FLASH_ATTN_3 = _backend("flash-attn 3", FlashAttention("flash_attn_3", (9,)))
FLASH_ATTN_4 = _backend("flash-attn 4", FlashAttention("flash_attn_4", (9, 10, 11), unlimited=None))
VARLEN_ATTN: Backend[PackedKernel] = Backend(
    "torch varlen", _unsupported_by_varlen_attn, varlen_attn_kernel, device="cuda"
)
