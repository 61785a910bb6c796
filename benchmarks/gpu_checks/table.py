"""The results as text and Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date

from gpu_checks.items import Facts, Result

SIDES = ("ours", "ours, offload", "trl", "plain")
LONGEST = 160
"""Characters of an error in the table."""


def line(result: Result) -> str:
    """One result, for the terminal."""
    facts = {name: fact for name, fact in result.facts.items() if fact not in ([], {}, False)}
    said = result.why or json.dumps(facts, ensure_ascii=False, default=str)
    return f"{result.status:<8}{result.seconds:>6.1f} s  {result.name}  {said[:400]}"


def tables(machine: Facts, results: Sequence[Result], missing: Sequence[str]) -> str:
    """All results as Markdown: what was checked, what was measured, what did not run.

    Args:
        machine: GPU and versions.
        results: in the order in which they are shown.
        missing: names of the checks that did not run.
    """
    with_what = ", ".join(f"{name} {what}" for name, what in machine.items())
    parts = [f"{date.today().isoformat()}; {with_what}."]
    speeds = [result for result in results if _side(result) in (*SIDES, "plan")]
    checks = [result for result in results if result not in speeds]
    if checks:
        parts.append(_checks(checks))
    parts += [_losses(result.facts["sides"]) for result in checks if "sides" in result.facts]
    if speeds:
        parts.append(_speeds(speeds, _matmul_rate(results)))
    wrong = [result for result in results if not result.is_final]
    parts += [f"{result.status}: {line(result)}" for result in wrong]
    if missing:
        parts.append(f"Not run, the time was over: {', '.join(missing)}.")
    return "\n\n".join(parts) + "\n"


def _checks(results: Sequence[Result]) -> str:
    rows = ["| check | result | seconds |", "|---|---|---|"]
    for result in results:
        why = f": {result.why[:LONGEST]}" if result.why else ""
        wrong = result.facts.get("wrong")
        why += f": {', '.join(wrong)}" if isinstance(wrong, list) and wrong else ""
        rows.append(f"| {result.name} | {result.status}{_plain(why)} | {result.seconds} |")
    return "\n".join(rows)


def _losses(found: Facts) -> str:
    """Milliseconds and memory of each loss."""
    sides = list(next(iter(found.values())))
    head = " | ".join(f"{side}: ms, GiB" for side in sides)
    rows = [f"| loss of | {head} |", "|---" * (1 + len(sides)) + "|"]
    for name, figures in found.items():
        cells = [
            _plain(each.get("why", "")) or f"{each['ms']}, {each.get('peak GiB', '')}"
            for each in (figures[side] for side in sides)
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _speeds(results: Sequence[Result], matmul: float | None) -> str:
    rows = [
        "| model | method | tokens a step | by | tokens/s | of matmul | peak GiB | held GiB |"
        " plan GiB |",
        "|---" * 9 + "|",
    ]
    plans = {_case(r): r.facts.get("total GiB", "") for r in results if _side(r) == "plan"}
    for result in results:
        if _side(result) == "plan":
            continue
        model, method, tokens = _case(result).split("/")
        start = f"| {model} | {method} | {int(tokens):,} | {_side(result)} |"
        facts, plan = result.facts, plans.get(_case(result), "")
        if not facts:
            rows.append(f"{start} {_plain(result.why[:LONGEST])} | | | | {plan} |")
            continue
        share = f"{facts['TFLOP/s'] / matmul:.0%}" if matmul else ""
        held = facts.get("held GiB", "")
        speed = f"{facts['tokens/s']:,.0f}"
        rows.append(f"{start} {speed} | {share} | {facts['peak GiB']} | {held} | {plan} |")
    return "\n".join(rows)


def _matmul_rate(results: Sequence[Result]) -> float | None:
    """TFLOP/s of matrix products, where they were measured."""
    found = [r.facts["matmul TFLOP/s"] for r in results if "matmul TFLOP/s" in r.facts]
    return found[0] if found and found[0] else None


def _case(result: Result) -> str:
    return result.name.rpartition("/")[0]


def _side(result: Result) -> str:
    return result.name.rpartition("/")[2]


def _plain(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")
