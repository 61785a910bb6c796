"""``xtuner list-dataset-format``: every key, its fields, and quickly."""

from __future__ import annotations

import subprocess
import sys

from xtuner.entry_point import main

PUBLISHED = """
alpaca alpaca_zh arxiv code_alpaca colors crime_kg_assitan default law_reference llava_image_only
llava medical msagent_react oasst1 openai openorca pretrain sql stack_exchange tiny_codes wizardlm
"""


def test_lists_the_published_keys_with_their_fields(capsys):
    assert main(["list-dataset-format"]) == 0
    lines = capsys.readouterr().out.splitlines()
    fields = dict(line.split(maxsplit=1) for line in lines if not line.startswith(("=", "-")))
    assert set(PUBLISHED.split()) <= set(fields)
    assert fields["openorca"] == "system_prompt, question, response"
    assert fields["openai"] == "messages: [{role, content}, ...]"


def test_pattern_that_fits_nothing_gives_status_1(capsys):
    assert main(["list-dataset-format", "-p", "nothing"]) == 1
    assert main(["list-dataset-format", "-p", "ALPACA"]) == 0
    assert "code_alpaca" in capsys.readouterr().out


def test_loads_nothing_heavy():
    code = (
        "import sys; from xtuner.entry_point import main; main(['list-dataset-format']);"
        "sys.exit(bool({'torch', 'datasets', 'mmengine', 'pyarrow'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0
