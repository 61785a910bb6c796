"""The whole examination of a dataset: rows, then tokens, then a sample, then the advice."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from xtuner.doctor.encoded import measure_all, text_datasets
from xtuner.doctor.findings import Place
from xtuner.doctor.parts import find_parts
from xtuner.doctor.report import Report
from xtuner.doctor.scan import Scan, scan
from xtuner.doctor.show import Shown
from xtuner.doctor.tokens import TokenFacts
from xtuner.utils.errors import UserError, Where
from xtuner.utils.few_steps import few_steps_advice_of
from xtuner.utils.hub import ModelUnavailableError
from xtuner.utils.lang import tr


def examine(
    config: str, dataset: Mapping[str, Any], *, all_rows: bool = False
) -> tuple[Report, Shown | None]:
    """Examine a dataset.

    Args:
        config: the config's name or path, for the texts.
        dataset: the value of its ``train_dataloader.dataset``.
        all_rows: encode all rows of large tables, too.

    Returns:
        The report, and a sample with its mask where there is one to show.
    """
    result = scan(find_parts(dataset))
    facts, shown, no_tokens = None, None, ""
    datasets = text_datasets(dataset)
    if result.findings.has_errors:
        no_tokens = tr("Tokens are counted once everything marked ✗ is fixed.")
    elif not datasets:
        no_tokens = tr(
            "Tokens are counted for process_hf_dataset with a tokenizer and max_length, and for "
            "VisionLanguageDataset."
        )
    else:
        try:
            rows = [] if all_rows else result.rows_of_parts
            facts, shown = measure_all(datasets, result.findings, rows=rows)
        except ModelUnavailableError as error:
            no_tokens = tr("Tokens are not counted: {error}", error=error.message)
        except UserError as error:
            where = error.where or Where()
            place = Place(where.file or config, where.line or 1, error.message)
            result.findings.add("cannot-build", place)
        except OSError as error:
            if error.errno is None:  # how transformers says that a tokenizer is not to be had
                no_tokens = tr("Tokens are not counted: {error}", error=_first_line(error))
            else:  # the disk is full, the cache is read-only, ...
                detail = f"{error.strerror}: {error.filename or ''}".rstrip(": ")
                result.findings.add("cannot-build", Place(config, 1, detail))
    return _report(config, result, facts, no_tokens), shown


def _report(config: str, result: Scan, facts: TokenFacts | None, no_tokens: str) -> Report:
    sampled = len(facts.lengths) if facts is not None and facts.unmeasured else 0
    return Report(config, result, facts, no_tokens, advice(config, result, no_tokens, sampled))


def with_few_steps(report: Report, settings: Mapping[str, Any]) -> Report:
    """The report, with a warning where the run takes fewer steps than teach anything.

    Args:
        report: of the training dataset.
        settings: the whole config.
    """
    if report.tokens is None:
        return report
    rows = report.tokens.packs or report.tokens.rows
    too_few = few_steps_advice_of(rows, settings)
    if too_few is None:
        return report
    report.scan.findings.add("few-steps", Place(report.config, 1, too_few))
    return _report(report.config, report.scan, report.tokens, report.no_tokens)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def advice(config: str, result: Scan, not_built: str = "", sampled: int = 0) -> str:
    """What to do next, in one sentence or two.

    Args:
        config: the config's name or path.
        result: of the scan.
        not_built: why the dataset was not built as training does it; empty where it was.
        sampled: how many rows were encoded, where these were not all.
    """
    if result.findings.has_errors:
        return tr("Fix everything marked ✗, then run this command again.")
    if not result.findings.is_clean:
        return tr(
            "Look at what is marked !; the dataset can be trained on: xtuner train {config}",
            config=shlex.quote(config),
        )
    if not_built:
        return tr(
            "Nothing is wrong with the rows; whether training can build the dataset is not known."
        )
    if sampled:
        return tr(
            "Nothing is wrong with the rows, of which {count:,} were encoded: xtuner train "
            "{config}",
            count=sampled,
            config=shlex.quote(config),
        )
    return tr("The dataset is ready: xtuner train {config}", config=shlex.quote(config))
