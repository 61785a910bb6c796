"""GPUs by name: their memory, and how fast they multiply matrices in 16 bits."""

from __future__ import annotations

import re
from dataclasses import dataclass

from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr

GIB = 2**30
LARGEST = 400
"""GiB: a number above this is a card's (4090), unless a unit follows."""
USABLE = 0.97
"""Share of a card's memory that a process gets: the driver keeps the rest."""


@dataclass(frozen=True)
class Card:
    """A kind of GPU.

    Attributes:
        name: as makers call it.
        memory: bytes.
        tflops: 10^12 operations/s of dense matrix products in bfloat16 (float16 where the card has
            no bfloat16), accumulated in float32, as the maker's data sheet has it; None: unknown.
    """

    name: str
    memory: int
    tflops: float | None = None

    @property
    def usable(self) -> int:
        return int(self.memory * USABLE)


# Data sheets: nvidia.com/en-us/data-center/{tesla-t4,v100,a10...}, RTX ones from the
# architecture whitepapers (Ampere GA102, Ada, Blackwell), dense figures with float32 accumulation.
CARDS = {
    card.name: card
    for card in (
        Card("T4", 16 * GIB, 65),
        Card("V100-16GB", 16 * GIB, 125),
        Card("V100", 32 * GIB, 125),
        Card("RTX3060", 12 * GIB, 25),
        Card("RTX3090", 24 * GIB, 71),
        Card("RTX4060", 8 * GIB, 30),
        Card("RTX4070", 12 * GIB, 58),
        Card("RTX4080", 16 * GIB, 97),
        Card("RTX4090", 24 * GIB, 165),
        Card("RTX5090", 32 * GIB, 209),
        Card("A10", 24 * GIB, 125),
        Card("L4", 24 * GIB, 121),
        Card("A6000", 48 * GIB, 155),
        Card("L40S", 48 * GIB, 362),
        Card("A100-40GB", 40 * GIB, 312),
        Card("A100", 80 * GIB, 312),
        Card("H100", 80 * GIB, 989),
        Card("H200", 141 * GIB, 989),
        Card("B200", 180 * GIB, 2250),
    )
}


def card(text: str) -> Card:
    """A card by its name, or by its memory: ``24GB``, ``24``.

    Raises:
        UserError: for another text.
    """
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(g|gb|gib)?", text.strip(), re.IGNORECASE)
    if size and (size[2] or float(size[1]) <= LARGEST):
        return Card(f"{float(size[1]):g} GiB GPU", int(float(size[1]) * GIB))
    wanted = _plain(text)
    for name, known in CARDS.items():
        if wanted in (_plain(name), _plain(name).removeprefix("rtx")):
            return known
    raise UserError(
        tr("there is no GPU {name!r} in the table.", name=text),
        hint=tr("give its memory (--gpu 24GB), or one of {names}", names=", ".join(CARDS)),
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]|geforce|nvidia|tesla", "", name.lower())
