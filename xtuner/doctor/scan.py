"""The scanner: every row of every part of a dataset through the checks, in bounded memory."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from xtuner.dataset.file_sections import DataFiles
from xtuner.dataset.prepare.parallel_map import ordered_map, usable_processes
from xtuner.dataset.reading import Row, Unreadable, problem_of
from xtuner.doctor.checks import (
    FIELD_CHECKS,
    MESSAGE_CHECKS,
    fields_there,
    images,
    images_in_text,
    roles,
    same_choice,
)
from xtuner.doctor.findings import PLACES, Findings, Place
from xtuner.doctor.layouts import (
    AUTO,
    BY_AUTO,
    LAYOUTS,
    READ_BY_AUTO,
    Layout,
    layout_named,
    named,
    preference_layout,
    recognise,
)
from xtuner.doctor.rules import ERROR, RULES
from xtuner.doctor.turns import Message, messages_of_row, messages_with_images
from xtuner.utils.lang import tr

Rows = Callable[[], Iterator[Row | Unreadable]]
XTUNER = LAYOUTS["xtuner"]
CUSTOM = Layout("custom", {})
"""What only the user's own map function can read."""
IMAGES = Layout("images", {})
"""Conversations with images, whatever their layout."""


@dataclass
class Part:
    """One dataset of a config.

    Args:
        name: what to call it.
        rows: gives its raw rows, anew at each call.
        map_fn: its row map function; None when rows are in the layout ``xtuner`` already.
        layout: the layout that ``map_fn`` reads; None when ``map_fn`` is the user's own (or there
            is none and the builder reads rows of its own kind), ``auto`` when it recognises it.
        image_folder: where the images of its rows are; None when it has none.
        path: the keys from the dataset's settings to those of the part; None when these take no
            ``dataset_map_fn``.
        has_content_parts: whether its rows are conversations with images in any layout, of which
            encoding names those that cannot be used.
        drops_bad_rows: whether training leaves out rows that cannot be read.
    """

    name: str
    rows: Rows
    map_fn: Callable[[Any], Any] | None = None
    layout: Layout | None = XTUNER
    image_folder: str | None = None
    path: tuple[str, ...] | None = None
    has_content_parts: bool = False
    drops_bad_rows: bool = False


@dataclass
class Scan:
    """What a scan has found.

    ``good`` counts the rows that can be trained on; ``rows_of_parts`` has the rows of each part, in
    order; ``layouts`` how many rows each layout has.
    ``map_fns`` has, by the path of each part, the lines that set a map function which fits where
    its own does not: a text for each layout of the rows.
    """

    findings: Findings = field(default_factory=Findings)
    rows: int = 0
    good: int = 0
    rows_of_parts: list[int] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    layouts: dict[str, int] = field(default_factory=dict)
    map_fns: dict[tuple[str, ...], list[str]] = field(default_factory=dict)


def scan(parts: Iterable[Part], processes: int = 32) -> Scan:
    """Examine every row of every part.

    Args:
        parts: of the dataset.
        processes: at most, where files are large and are JSON lines; the result does not depend
            on it.
    """
    result = Scan()
    copies = _Copies()
    for part in parts:
        rows = part.rows
        sections = rows.sections() if isinstance(rows, DataFiles) else [rows]
        examine = partial(_examined, part, sections)
        scans = ordered_map(examine, len(sections), usable_processes(processes))
        whole = _PartScan(part)
        for each in scans:
            whole.extend(each)
        whole.report(result)
        copies.extend(whole.copies)
    copies.report(result.findings)
    return result


def _examined(part: Part, sections: Sequence[Rows], number: int) -> _PartScan:
    return _PartScan(part).run(sections[number])


class _PartScan:
    """The scan of one part, or of some of its rows."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.findings = Findings()
        self.copies = _Copies()
        self.files: dict[str, int] = {}
        self.good = 0
        self.fitting = 0
        self.other_layouts: dict[str, tuple[int, list[Place]]] = {}
        self.types: dict[str, dict[str, tuple[int, Place]]] = {}
        self.layouts: dict[str, tuple[int, Place]] = {}
        self.not_given: tuple[int, list[Place]] = (0, [])
        """Rows without a field that may be left out where other rows have it: ``is_given``."""
        self.is_given = False

    def __getstate__(self) -> dict[str, Any]:
        """Without the part: the user's functions need not be pickled."""
        return {name: value for name, value in vars(self).items() if name != "part"}

    def run(self, rows: Rows) -> _PartScan:
        """Examine rows of the part."""
        examine = self._examine_parts if self.part.has_content_parts else self._examine
        for row in rows():
            self.files.setdefault(row.file, 0)
            if isinstance(row, Unreadable):
                is_dropped = self.part.drops_bad_rows and not row.ends_file
                place = Place(row.file, row.line, row.why)
                self.findings.add("left-out" if is_dropped else "bad-json", place)
                continue
            self.files[row.file] += 1
            if examine(row):
                self.good += 1
        return self

    def extend(self, later: _PartScan) -> None:
        """Add the scan of rows that come after these."""
        self.findings.extend(later.findings)
        self.copies.extend(later.copies)
        self.is_given |= later.is_given
        count, places = self.not_given
        self.not_given = (count + later.not_given[0], (places + later.not_given[1])[:PLACES])
        self.good += later.good
        self.fitting += later.fitting
        for file, rows in later.files.items():
            self.files[file] = self.files.get(file, 0) + rows
        for name, (count, places) in later.other_layouts.items():
            before, known = self.other_layouts.get(name, (0, []))
            self.other_layouts[name] = (before + count, (known + places)[:PLACES])
        _add_counts(self.layouts, later.layouts)
        for name, kinds in later.types.items():
            _add_counts(self.types.setdefault(name, {}), kinds)

    def report(self, result: Scan) -> None:
        """Add what was found to the scan of the whole dataset, and what only all rows show."""
        self._report_not_given()
        result.findings.extend(self.findings)
        result.rows_of_parts.append(sum(self.files.values()))
        result.rows += result.rows_of_parts[-1]
        result.good += self.good
        result.files += [file for file in self.files if file not in result.files]
        if not any(self.files.values()) and "bad-json" not in result.findings:
            result.findings.add("no-rows", Place(self.part.name, 1))
        self._report_other_layouts(result)
        self._report_mixture(result)
        self._report_types(result.findings)

    def _examine(self, row: Row) -> bool:
        """Check one row; gives whether it can be trained on."""
        if not isinstance(row.value, dict):
            self._add_no_object(row)
            return False
        if self.part.layout is None and self.part.map_fn is None:
            return True  # a builder with a layout of its own
        row = self._plain(row)
        value, layout = row.value, self._layout(row)
        if layout is None:
            return False
        if self._field_problems(row, value, layout):
            return False
        self.fitting += 1
        messages = self._messages(row, value, layout)
        if messages is None:
            return False
        layout = XTUNER if layout is CUSTOM else layout
        problems = list(roles(messages, layout))
        if any(code == "bad-role" for code, _ in problems):
            self._add("bad-role", row, problems[0][1])
            return False  # who speaks is unknown, so nothing else can be told
        problems += [problem for check in MESSAGE_CHECKS for problem in check(messages, layout)]
        if layout.preference:
            problems += same_choice(value)
        if self.part.image_folder is not None:
            problems += images(value, messages, self.part.image_folder)
        elif layout.name not in ("llava", "llava_image_only"):
            problems += images_in_text(value, messages)
        for code, detail in problems:
            self._add(code, row, detail)
        self.copies.add(row, (tuple((one.role, one.text) for one in messages), _extra(value)))
        return not any(code in ("no-answer", "not-trained") for code, _ in problems)

    def _examine_parts(self, row: Row) -> bool:
        """Check a row with images; gives whether it can be trained on."""
        if not isinstance(row.value, dict):
            self._add_no_object(row)
            return False
        messages = messages_with_images(row.value, self.part.map_fn)
        if messages is None:
            return False
        problems = list(roles(messages, IMAGES))
        problems += [problem for check in MESSAGE_CHECKS for problem in check(messages, IMAGES)]
        for code, detail in problems:
            self._add(code, row, detail)
        self.copies.add(row, (tuple((one.role, one.text) for one in messages), repr(row.value)))
        return not any(code in ("no-answer", "not-trained") for code, _ in problems)

    def _plain(self, row: Row) -> Row:
        """A pair of answers as training reads it; one that it cannot read as it is."""
        if self.part.layout is None or self.part.layout.name != "preference":
            return row
        from xtuner.dataset.vision_language.pairs import plain_pair

        try:
            # with the other columns: images are named, too
            return replace(row, value={**row.value, **plain_pair(row.value)})
        except (ValueError, KeyError, TypeError):
            return row

    def _layout(self, row: Row) -> Layout | None:
        """The layout to check a row against; None when it is of another than the config's."""
        layout, found = self.part.layout, recognise(row.value)
        if layout is not None and layout.name == "preference" and layout.preference:
            layout = preference_layout(row.value)
            found = layout if found is None or layout.fits(row.value) else found
        if layout is not None and layout.preference and found is not None and not found.preference:
            found = layout  # a map function for other training is of no use here
        if layout is None:
            self._note_types(row)
            return CUSTOM
        if layout.name == "auto":
            if found is None and BY_AUTO["llama-factory"].fits(row.value):
                found = BY_AUTO["llama-factory"]
            if found is None:
                self._add("missing-field", row, _fields(row.value))
                return None
            count, first = self.layouts.get(found.name, (0, Place(row.file, row.line)))
            self.layouts[found.name] = (count + 1, first)
            return replace(found, roles=AUTO.roles) if found.roles else found
        if found is None or found is layout or _reads_as_much(layout, found, row.value):
            return layout
        count, places = self.other_layouts.setdefault(found.name, (0, []))
        if len(places) < PLACES:
            places.append(Place(row.file, row.line, tr("layout {name}", name=found.name)))
        self.other_layouts[found.name] = (count + 1, places)
        return None

    def _messages(self, row: Row, value: dict[str, Any], layout: Layout) -> list[Message] | None:
        """Who says what; through the user's own map function when there is one."""
        if layout is not CUSTOM:
            return messages_of_row(value, layout)
        assert self.part.map_fn is not None
        try:
            mapped = self.part.map_fn(dict(value))
        except Exception as error:  # whatever the user's function may raise
            detail = f"{type(error).__name__}: {error}"
            code = "missing-field" if isinstance(error, KeyError) else "map-fn-failed"
            self._add(code, row, str(error) if code == "missing-field" else detail)
            return None
        if not isinstance(mapped, dict) or not XTUNER.fits(mapped):
            detail = tr("it must return {'conversation': [{'input', 'output'}]}")
            self._add("map-fn-failed", row, detail)
            return None
        if self._field_problems(row, mapped, XTUNER):
            return None
        return messages_of_row(mapped, XTUNER)

    def _field_problems(self, row: Row, value: Mapping[str, Any], layout: Layout) -> bool:
        """Note what is wrong with fields; gives whether training refuses the row for it."""
        self.is_given |= not layout.optional.isdisjoint(value)
        is_refused = False
        for code, detail in (found for check in FIELD_CHECKS for found in check(value, layout)):
            if code == "not-given":
                count, places = self.not_given
                self.not_given = (count + 1, [*places, Place(row.file, row.line, detail)][:PLACES])
            else:
                self._add(code, row, detail)
                is_refused |= RULES[code].level == ERROR
        return is_refused

    def _report_not_given(self) -> None:
        """A field is missing where no row has it: else Arrow gives None, which means nothing."""
        count, places = self.not_given
        if self.is_given or not count:
            return
        self.good -= count
        for place in places[:-1]:
            self.findings.add("missing-field", place)
        self.findings.add("missing-field", places[-1], count - len(places) + 1)

    def _add_no_object(self, row: Row) -> None:
        if self.part.drops_bad_rows:
            self._add("left-out", row, problem_of(row))
        else:
            self._add("not-an-object", row, named(row.value))

    def _add(self, code: str, row: Row, detail: str = "") -> None:
        if self.part.drops_bad_rows and RULES[code].level == ERROR:
            code, detail = "left-out", f"{RULES[code].title}: {detail}".removesuffix(": ")
        self.findings.add(code, Place(row.file, row.line, detail))

    def _report_other_layouts(self, result: Scan) -> None:
        """Rows of another layout: the map function is wrong when nothing fits it."""
        fitting: list[str] = []
        if self.part.path is not None:
            result.map_fns[self.part.path] = fitting
        others = [layout_named(name) for name in self.other_layouts]
        there = [*others, *([self.part.layout] if self.fitting and self.part.layout else [])]
        # of several layouts auto_map_fn reads each row as what it is
        auto = len(there) > 1 and all(layout.name in READ_BY_AUTO for layout in there)
        if auto and others:
            fitting.append(lines_to_paste(AUTO))
        for name, (count, places) in self.other_layouts.items():
            wrong = self.fitting == 0 or count > self.fitting
            code, paste = (
                ("wrong-map-fn", lines_to_paste(AUTO if auto else layout_named(name)))
                if wrong
                else ("mixed-layouts", "")
            )
            if wrong and not auto:
                fitting.append(paste)
            for index, place in enumerate(places):
                last = index == len(places) - 1
                result.findings.add(code, place, count - index if last else 1, paste)

    def _report_mixture(self, result: Scan) -> None:
        """With ``auto_map_fn``: which layouts there are; a mixture is no mistake there."""
        for name, (count, _) in self.layouts.items():
            result.layouts[name] = result.layouts.get(name, 0) + count
        if self.part.layout is not None and self.part.layout.name != "auto":
            name = self.part.layout.name
            result.layouts[name] = result.layouts.get(name, 0) + self.fitting

    def _note_types(self, row: Row) -> None:
        for name, value in row.value.items():
            if value is None:
                continue
            kinds = self.types.setdefault(name, {}) if len(self.types) < 1000 else {}
            kind = named(value)
            count, first = kinds.get(kind, (0, Place(row.file, row.line, f"{name!r}: {kind}")))
            kinds[kind] = (count + 1, first)

    def _report_types(self, findings: Findings) -> None:
        for kinds in self.types.values():
            rare = sorted(kinds.values(), key=lambda one: one[0])[:-1]
            for count, first in rare:
                findings.add("mixed-types", first, count)


def _add_counts(
    known: dict[str, tuple[int, Place]], later: Mapping[str, tuple[int, Place]]
) -> None:
    """Add counts, keeping the first places."""
    for name, (count, place) in later.items():
        before, first = known.get(name, (0, place))
        known[name] = (before + count, first)


def _reads_as_much(layout: Layout, found: Layout, row: Mapping[str, Any]) -> bool:
    """Whether the config's layout suits the row as well as the recognised one."""
    if found.name in ("llama-factory", "question/answer"):
        return False  # their columns besides question and answer would be dropped
    if layout.fits(row):
        return not set(found.fields) > set(layout.fields)
    # A row that has most of its fields is rather a broken row of this layout.
    have = sum(name in row for name in layout.fields)
    return have * 2 >= len(layout.fields) and have >= len(found.fields)


def lines_to_paste(layout: Layout) -> str:
    """The lines of a config that read this layout."""
    if not layout.map_fn:
        return "dataset_map_fn=None\n"
    module = "preference_dataset" if layout.preference else "map_fns"
    return f"from xtuner.dataset.{module} import {layout.map_fn}\ndataset_map_fn={layout.map_fn}\n"


def _fields(row: Mapping[str, Any]) -> str:
    return tr("no known layout fits it") + fields_there(row)


def _extra(row: Mapping[str, Any]) -> str:
    """What besides its texts makes a row different from another."""
    return repr((row.get("image"), row.get("rejected")))


class _Copies:
    """Rows seen before, at 20 bytes a row: a hash, the file's number and the line of each."""

    def __init__(self) -> None:
        self.hashes = array("q")
        self.files = array("i")
        self.lines = array("q")
        self.names: dict[str, int] = {}

    def add(self, row: Row, content: Hashable) -> None:
        self.hashes.append(hash(content))
        self.files.append(self.names.setdefault(row.file, len(self.names)))
        self.lines.append(row.line)

    def extend(self, later: _Copies) -> None:
        """Add rows that come after these."""
        numbers = [self.names.setdefault(name, len(self.names)) for name in later.names]
        self.hashes += later.hashes
        self.files.extend(numbers[file] for file in later.files)
        self.lines += later.lines

    def report(self, findings: Findings) -> None:
        """Note every copy, with the place of the row that it repeats."""
        import numpy as np

        hashes = np.frombuffer(self.hashes, dtype=np.int64)
        if not len(hashes):
            return
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1]) + 1
        names = list(self.names)
        starts = np.searchsorted(hashes[order], hashes[order][same], side="left")
        pairs = sorted(zip(order[same].tolist(), order[starts].tolist(), strict=True))
        for copy, first in pairs:
            origin = f"{names[self.files[first]]}:{self.lines[first]}"
            detail = tr("as {origin}", origin=origin)
            findings.add("duplicate", Place(names[self.files[copy]], self.lines[copy], detail))
