"""What the codes of problems mean: the text of ``xtuner explain`` and of the docs' table."""

from __future__ import annotations

from dataclasses import dataclass

from xtuner.utils.lang import N_, translate

ERROR, WARNING = "error", "warning"


@dataclass(frozen=True)
class Code:
    """What a code means (marked messages), with an example: lines at fault and correct ones."""

    code: str
    severity: str
    marked_title: str
    marked_reason: str
    wrong: str
    right: str

    @property
    def title(self) -> str:
        return translate(self.marked_title)

    @property
    def reason(self) -> str:
        return translate(self.marked_reason)


NOT_LOADED = Code(
    "XT0001",
    ERROR,
    N_("the config cannot be read"),
    N_(
        "The file is not valid Python, uses a name that it does not define, or fails while it "
        "is loaded. Nothing else can be checked until it loads."
    ),
    wrong="batch_size = 1\nmax_length = 2048 +",
    right="batch_size = 1\nmax_length = 2048",
)
NOT_FOUND = Code(
    "XT0002",
    ERROR,
    N_("there is no such config or key"),
    N_(
        "Neither a file nor a name of the catalogue, or a key of --cfg-options that the "
        "config does not have. 'xtuner list-cfg' lists the names."
    ),
    wrong="xtuner check-cfg quickstrat",
    right="xtuner check-cfg quickstart",
)
