"""The doctor's report as one HTML page."""

from __future__ import annotations

from html import escape

from xtuner.doctor.findings import Finding
from xtuner.doctor.report import STYLES, Report, sampled_note
from xtuner.doctor.show import Shown, html_page, sample_html
from xtuner.doctor.tokens import TokenFacts, histogram
from xtuner.utils.lang import tr

COLOURS = {"error": "#b42318", "warning": "#a15c07", "note": "#1d6a96"}


def report_page(report: Report, shown: Shown | None) -> str:
    """The whole page: findings, lengths, a sample with its mask, what to do next."""
    title = tr("Dataset of {config}", config=report.config)
    scan = report.scan
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{scan.rows:,} {tr('rows')}: {escape(', '.join(scan.files))}</p>",
        f"<p><b>{escape(report.advice)}</b></p>",
        f"<h2>{tr('Findings')}</h2>",
    ]
    parts += [_finding(finding) for finding in scan.findings]
    if not list(scan.findings):
        parts.append(f"<p>{tr('nothing is wrong')}</p>")
    if report.tokens:
        parts.append(_tokens(report.tokens))
    elif report.no_tokens:
        parts.append(f"<p>{escape(report.no_tokens)}</p>")
    if shown:
        parts.append(sample_html(shown))
    return html_page(title, "\n".join(parts))


def _finding(finding: Finding) -> str:
    colour, mark = COLOURS[finding.rule.level], STYLES[finding.rule.level][0]
    places = "".join(
        f"<li><code>{escape(str(place))}</code> {escape(ascii_safe(place.detail))}</li>"
        for place in finding.places
    )
    more = finding.count - len(finding.places)
    rest = f"<li>{tr('and {more:,} more', more=more)}</li>" if more > 0 else ""
    paste = f"<pre>{escape(finding.paste)}</pre>" if finding.paste else ""
    return (
        f'<h3 style="color:{colour}">{mark} {finding.count:,} × {escape(finding.rule.title)} '
        f"<code>{finding.code}</code></h3><p>{escape(finding.rule.advice)}</p>{paste}"
        f"<ul>{places}{rest}</ul>"
    )


def ascii_safe(text: str) -> str:
    """Text whose lone surrogates cannot break the writing of the page."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _tokens(facts: TokenFacts) -> str:
    bars = histogram(facts.lengths)
    most = max(bar.count for bar in bars)
    rows = "".join(
        f"<tr><td><code>{bar.start:,} – {bar.stop - 1:,}</code></td><td>{bar.count:,}</td>"
        f'<td style="width:30rem"><div style="height:1em;width:{100 * bar.count / most:.1f}%;'
        f'background:{_bar_colour(bar.start, facts.max_length)}"></div></td></tr>'
        for bar in bars
    )
    kept = facts.tokens - facts.lost
    lines = [
        (tr("tokens in an epoch"), f"{kept:,}"),
        (tr("of these trained"), f"{facts.trained:,}"),
        (tr("cut at max_length"), f"{facts.lost:,}"),
        (tr("longest row"), f"{max(facts.lengths):,}"),
    ]
    if facts.packs:
        lines.append((tr("packs"), f"{facts.packs:,} ({facts.fullness:.1%})"))
    figures = "".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in lines)
    note = f"<p>{sampled_note(facts)}</p>" if facts.unmeasured else ""
    return f"<h2>{tr('Tokens')}</h2>{note}<table>{figures}</table><table>{rows}</table>"


def _bar_colour(start: int, max_length: int | None) -> str:
    return "#b42318" if max_length is not None and start > max_length else "#2e8b57"
