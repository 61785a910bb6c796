"""The doctor's report: for the terminal, and as plain data for ``--json`` and the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from xtuner.doctor.findings import Finding
from xtuner.doctor.rules import ERROR, NOTE, WARNING
from xtuner.doctor.scan import Scan
from xtuner.doctor.tokens import TokenFacts, histogram
from xtuner.utils.lang import tr
from xtuner.utils.terminal import visible

STYLES = {ERROR: ("✗", "bold red"), WARNING: ("!", "yellow"), NOTE: ("·", "cyan")}


@dataclass(frozen=True)
class Report:
    """All that the doctor has to say; ``no_tokens`` says why there is no count of tokens."""

    config: str
    scan: Scan
    tokens: TokenFacts | None
    no_tokens: str
    advice: str

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "config": self.config,
            "clean": self.scan.findings.is_clean,
            "rows": self.scan.rows,
            "good": self.scan.good,
            "files": self.scan.files,
            "layouts": self.scan.layouts,
            "findings": [_finding_dict(finding) for finding in self.scan.findings],
            "tokens": _tokens_dict(self.tokens) if self.tokens else None,
            "no_tokens": self.no_tokens or None,
        }


def _finding_dict(finding: Finding) -> dict[str, Any]:
    return {
        "code": finding.code,
        "level": finding.rule.level,
        "count": finding.count,
        "title": finding.rule.title,
        "advice": finding.rule.advice,
        "paste": finding.paste or None,
        "places": [
            {"file": place.file, "line": place.line, "detail": place.detail}
            for place in finding.places
        ],
    }


def _tokens_dict(facts: TokenFacts) -> dict[str, Any]:
    return {
        "rows": len(facts.lengths),
        "unmeasured": facts.unmeasured,
        "tokens": facts.tokens,
        "trained": facts.trained,
        "lost": facts.lost,
        "longest": max(facts.lengths),
        "median": facts.median,
        "max_length": facts.max_length,
        "packs": facts.packs,
        "fullness": round(facts.fullness, 4),
        "histogram": [vars(bar) for bar in histogram(facts.lengths)],
    }


def print_report(report: Report, console: Console) -> None:
    """Print the report; every line fits the console or is folded."""
    scan = report.scan
    layouts = ", ".join(f"{name} {count:,}" for name, count in scan.layouts.items())
    rows, files = f"{scan.rows:,}", len(scan.files)
    line = tr("{rows} rows in {files} file(s)", rows=rows, files=files)
    if layouts:
        line += tr("; layout: {layouts}", layouts=layouts)
    console.print(Text(line, style="bold"))
    console.print()
    for finding in scan.findings:
        _print_finding(finding, console)
    if not list(scan.findings):
        console.print(Text(tr("✓ nothing is wrong"), style="bold green"))
        console.print()
    if report.tokens:
        _print_tokens(report.tokens, console)
    elif report.no_tokens:
        console.print(Text(report.no_tokens, style="yellow"))
        console.print()


def _print_finding(finding: Finding, console: Console) -> None:
    mark, style = STYLES[finding.rule.level]
    head = Text(f"{mark} {finding.count:,} × {finding.rule.title}", style=style)
    console.print(head.append(f"  [{finding.code}]", style="dim not bold"))
    for place in finding.places:
        detail = "\n      ".join(visible(line, keep="") for line in place.detail.splitlines())
        detail = f"  {detail}" if detail else ""
        console.print(
            Text(f"    {visible(str(place))}", style="bold").append(detail, style="not bold")
        )
    more = finding.count - len(finding.places)
    if more > 0:
        console.print(Text(tr("    and {more:,} more", more=more), style="dim"))
    console.print(Padding(Text(f"→ {finding.rule.advice}"), (0, 0, 0, 2), expand=False))
    for line in finding.paste.splitlines():
        console.print(Text(f"      {line}", style="bold green"), soft_wrap=True)
    console.print()


def sampled_note(facts: TokenFacts) -> str:
    """That the figures are those of a sample."""
    return tr(
        "These are {rows:,} rows drawn at random of {all:,}; --all-rows encodes all.",
        rows=len(facts.lengths),
        all=facts.rows,
    )


def _print_tokens(facts: TokenFacts, console: Console) -> None:
    console.print(Text(tr("Tokens"), style="bold"))
    console.print(
        tr(
            "  {tokens:,} in {rows:,} rows; median {median:,}, longest {longest:,}",
            tokens=facts.tokens,
            rows=len(facts.lengths),
            median=facts.median,
            longest=max(facts.lengths),
        )
    )
    if facts.unmeasured:
        console.print(f"  {sampled_note(facts)}", markup=False)
    _print_bars(facts, console)
    kept = facts.tokens - facts.lost
    share = facts.trained / kept if kept else 0.0
    console.print(
        tr(
            "  an epoch: {kept:,} tokens, {trained:,} ({share:.0%}) trained",
            kept=kept,
            trained=facts.trained,
            share=share,
        )
    )
    if facts.max_length:
        part = facts.lost / facts.tokens if facts.tokens else 0.0
        console.print(
            tr(
                "  cut at max_length={max_length:,}: {lost:,} tokens ({part:.1%})",
                max_length=facts.max_length,
                lost=facts.lost,
                part=part,
            )
        )
    if facts.packs:
        console.print(
            tr(
                "  packed: {packs:,} packs, {fullness:.1%} full",
                packs=facts.packs,
                fullness=facts.fullness,
            )
        )
    console.print()


def _print_bars(facts: TokenFacts, console: Console) -> None:
    bars = histogram(facts.lengths)
    most = max(bar.count for bar in bars)
    room = max(10, min(60, console.width - 32))
    for bar in bars:
        cut = facts.max_length is not None and bar.start > facts.max_length
        size = round(room * bar.count / most)
        blocks = "█" * (size or bool(bar.count))
        label = f"{bar.start:>9,} – {bar.stop - 1:<9,}"
        line = Text(f"  {label} ").append(blocks, style="red" if cut else "green")
        console.print(line.append(f" {bar.count:,}"))
