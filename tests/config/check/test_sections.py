"""Sections that nothing reads."""

from tests.config.check.rules import keys
from xtuner.config.check import sections


def test_settings_that_a_run_reads_are_known():
    text = "find_unused_parameters = True\nsequence_parallel_size = 2\nnothing_reads_me = 1\n"
    assert keys(sections.unused_setting, text) == ["nothing_reads_me"]
