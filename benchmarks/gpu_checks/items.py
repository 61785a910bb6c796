"""What a check is: a function that runs in a process of its own, and its limits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

Facts: TypeAlias = dict[str, Any]
"""What a check found; under ``wrong`` what does not hold."""


@dataclass(frozen=True)
class Setting:
    """Where a check runs.

    Args:
        device: ``cuda`` or ``cpu``.
        dry: tiny shapes and few steps.
        folder: an empty folder of its own.
    """

    device: str
    dry: bool
    folder: Path


class AbsentError(Exception):
    """A check cannot run here, with the reason: a library is missing, or a GPU of another kind."""


@dataclass(frozen=True)
class Item:
    """One check.

    Args:
        name: unique; parts are separated by slashes.
        stage: 1 for correctness, 2 for speed and memory.
        check: raises where it fails, and ``AbsentError`` where it cannot run.
        seconds: its time limit.
        alone: nothing else may use the GPU meanwhile.
        on_cpu: it does not use the GPU.
    """

    name: str
    stage: int
    check: Callable[[Setting], Facts]
    seconds: float = 60
    alone: bool = False
    on_cpu: bool = False


@dataclass(frozen=True)
class Result:
    """What came of a check.

    Args:
        name: of the item.
        status: ``ok``, ``wrong``, ``failed``, ``timeout``, ``absent``.
        seconds: how long it took.
        facts: what it found.
        why: the error, or why it is absent.
        log: the end of what it printed, where it failed.
    """

    name: str
    status: str
    seconds: float
    facts: Facts
    why: str = ""
    log: str = ""

    @property
    def is_final(self) -> bool:
        """Whether it need not be run again."""
        return self.status in ("ok", "absent")


class Results:
    """The results of all calls, in a JSON file that is rewritten with each of them.

    Args:
        file: is read if it is there; results of another machine are dropped.
        machine: GPU and versions.
    """

    def __init__(self, file: Path, machine: Facts) -> None:
        self.file, self.machine = file, machine
        self.found: dict[str, Result] = {}
        if file.exists():
            saved = json.loads(file.read_text("utf-8"))
            if saved["machine"] == machine:
                self.found = {line["name"]: Result(**line) for line in saved["results"]}

    def add(self, result: Result) -> None:
        """Keep a result, in the file too."""
        self.found[result.name] = result
        whole = {"machine": self.machine, "results": [asdict(r) for r in self.found.values()]}
        text = json.dumps(whole, indent=1, ensure_ascii=False, default=str) + "\n"
        aside = self.file.with_suffix(".part")
        aside.write_text(text, "utf-8")
        aside.replace(self.file)
