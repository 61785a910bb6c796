"""A proof: two ways of computing the same, how far apart they are, and how far they may be."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

from xtuner.utils.lang import N_, tr, translate

State = Literal["passed", "failed", "skipped"]
ROUNDING = 1e-4
"""Relative bound of what float32 computes in another order."""
AS_EXACT = 1.5
"""How many times as far from float32 another way of rounding to bfloat16 may be."""


class Claim(NamedTuple):
    """What a proof is about.

    Attributes:
        text: what is equal, a marked message.
        bound: the largest difference that counts as equal.
        why: why that bound, a marked message.
    """

    text: str
    bound: float
    why: str


_SUMS = N_("float32 rounding; a wrong mask, scale or divisor gives more than 1e-2")
_BITS = N_("the same operations give the same bits")
_HALF_SUMS = N_(
    "how many times as far from float32 as without a compiler: both round to bfloat16, each its way"
)
_COUNT = N_("a count: none may differ")
CLAIMS = {
    "plain": Claim(N_("fast attention, loss, LoRA = plain transformers, peft"), ROUNDING, _SUMS),
    "packed": Claim(N_("packed or padded rows = each sample alone"), ROUNDING, _SUMS),
    "checkpointed": Claim(N_("activation checkpointing = none"), ROUNDING, _SUMS),
    "compiled": Claim(N_("compiled = not compiled"), AS_EXACT, _HALF_SUMS),
    "gpu": Claim(N_("the GPU = the CPU"), ROUNDING, _SUMS),
    "gradients": Claim(N_("every trained weight gets a gradient, no frozen one does"), 0, _COUNT),
    "accumulated": Claim(N_("accumulated micro-batches = one batch"), ROUNDING, _SUMS),
    "ranks": Claim(N_("two processes = one"), ROUNDING, _SUMS),
    "resumed": Claim(N_("resumed = uninterrupted"), 0, _BITS),
    "exported": Claim(N_("exported model = trained model (logits)"), ROUNDING, _SUMS),
    "merged": Claim(N_("merged model = base and adapter (logits)"), ROUNDING, _SUMS),
    "template": Claim(N_("exported chat template = token ids of training"), 0, _COUNT),
}  # fmt: skip
"""All proofs, in the order in which they are shown."""


class Measured(NamedTuple):
    """What a proof measured.

    Attributes:
        difference: relative, or a number of weights or tokens.
        detail: what was compared, or what differs.
    """

    difference: float
    detail: str = ""


class Skipped(Exception):
    """A proof has nothing to prove here; its text says why."""


@dataclass(frozen=True)
class Proof:
    """What came of a proof.

    Attributes:
        name: a key of ``CLAIMS``.
        state: whether it holds.
        difference: what was measured; None where nothing was.
        bound: the largest difference that counts as equal.
        detail: what was compared, what differs, or why it was skipped.
    """

    name: str
    state: State
    difference: float | None
    bound: float
    detail: str = ""

    @property
    def claim(self) -> str:
        """What is equal, in the user's language."""
        return translate(CLAIMS[self.name].text)

    @property
    def why(self) -> str:
        """Why that bound, in the user's language."""
        return translate(CLAIMS[self.name].why)

    def to_dict(self) -> dict[str, object]:
        """As plain data, for ``--json``."""
        found = asdict(self)
        if self.difference is not None and not math.isfinite(self.difference):
            found["difference"] = str(self.difference)
        return {**found, "claim": self.claim, "why": self.why}


def prove(name: str, measure: Callable[[], Measured]) -> Proof:
    """Measure, and compare with the bound.

    Args:
        name: a key of ``CLAIMS``.
        measure: gives what was measured; an error of it is a proof that failed.
    """
    from xtuner.library_errors import one_line
    from xtuner.utils.errors import UserError

    bound = CLAIMS[name].bound
    try:
        difference, detail = measure()
    except Skipped as reason:
        return Proof(name, "skipped", None, bound, str(reason))
    except UserError as error:
        return Proof(name, "failed", None, bound, str(error))
    except Exception as error:  # of a model's class or a hook, which we do not know
        import traceback

        traceback.print_exc()  # into the log of the process
        return Proof(name, "failed", None, bound, one_line(error))
    state: State = "passed" if difference <= bound else "failed"
    return Proof(name, state, difference, bound, detail)


def skipped(name: str, reason: str) -> Proof:
    """A proof that was not tried."""
    return Proof(name, "skipped", None, CLAIMS[name].bound, reason)


def summary(proofs: list[Proof]) -> str:
    """How many hold, in one line."""
    counts = {state: sum(proof.state == state for proof in proofs) for state in _STATES}
    return tr(
        "{passed} of {tried} proofs hold, {skipped} skipped.",
        passed=counts["passed"],
        tried=counts["passed"] + counts["failed"],
        skipped=counts["skipped"],
    )


_STATES: tuple[State, ...] = ("passed", "failed", "skipped")
