"""The report: in a terminal, as plain data, and one page; harmless whatever the data hold."""

import io
import json
from array import array

from rich.console import Console

from xtuner.doctor.findings import Place
from xtuner.doctor.page import report_page
from xtuner.doctor.report import Report, print_report
from xtuner.doctor.scan import Scan
from xtuner.doctor.tokens import TokenFacts


def report_of(tokens=None, no_tokens=""):
    scan = Scan(rows=1200, good=1199, files=["a.jsonl"], layouts={"alpaca": 1200})
    for line in range(1, 9):
        scan.findings.add("duplicate", Place("a.jsonl", line, "as\x1b[31m"))
    scan.findings.add("wrong-map-fn", Place("a.jsonl", 3), paste="dataset_map_fn=alpaca_map_fn\n")
    scan.findings.add("very-long", Place("a.jsonl", 4, "<b>"))
    return Report("c.py", scan, tokens, no_tokens, "do this")


FACTS = TokenFacts(array("i", [10, 20, 40]), trained=30, lost=8, max_length=32, packs=2, places=64)


def printed(report):
    out = io.StringIO()
    print_report(report, Console(file=out, width=90))
    return out.getvalue()


def test_worst_first_with_places_and_what_to_paste():
    text = printed(report_of(no_tokens="because"))
    assert "1,200 rows in 1 file(s); layout: alpaca 1,200" in text and "because" in text
    order = [text.index(f"[{code}]") for code in ("wrong-map-fn", "duplicate", "very-long")]
    assert order == sorted(order)
    assert "dataset_map_fn=alpaca_map_fn" in text and "and 3 more" in text
    assert "\x1b[31m" not in text and "\\u001b" in text


def test_a_message_of_several_lines_keeps_its_lines():
    report = report_of()
    report.scan.findings.add("cannot-build", Place("c.py", 1, "no row is left\nrows: 2\x07"))
    assert "c.py:1  no row is left\n      rows: 2\\u0007\n" in printed(report)


def test_figures_of_the_tokens():
    text = printed(report_of(FACTS))
    assert "70 in 3 rows; median 20, longest 40" in text
    assert "an epoch: 62 tokens, 30 (48%) trained" in text
    assert "cut at max_length=32: 8 tokens (11.4%)" in text
    assert "packed: 2 packs, 96.9% full" in text


def test_as_plain_data():
    report = json.loads(json.dumps(report_of(FACTS).as_dict()))
    assert report["clean"] is False and report["good"] == 1199
    codes = {one["code"]: (one["level"], one["count"]) for one in report["findings"]}
    assert codes == {"wrong-map-fn": ("error", 1), "duplicate": ("warning", 8),
                     "very-long": ("note", 1)}  # fmt: skip
    assert (report["tokens"]["lost"], report["tokens"]["fullness"]) == (8, 0.9688)


def test_the_page_escapes_what_the_data_hold():
    page = report_page(report_of(FACTS), None)
    assert "&lt;b&gt;" in page and "<b>do this</b>" in page and "<code><b>" not in page
