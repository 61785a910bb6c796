"""The quick import: optional packages are left out for its time only."""

from __future__ import annotations

import subprocess
import sys

import pytest

from xtuner.engine.startup import without_optional_optimizers


def test_optional_packages_are_left_out_and_come_back():
    name = "dadaptation"
    with without_optional_optimizers():
        assert sys.modules[name] is None
        with pytest.raises(ImportError):
            __import__(name)
    assert name not in sys.modules


def test_what_is_loaded_already_is_left_out_too_and_comes_back():
    """Else transformers looks for DeepSpeed at this time, and remembers that it is missing."""
    import transformers

    with without_optional_optimizers(), pytest.raises(ImportError):
        from transformers import Adafactor  # noqa: F401
    assert sys.modules["transformers"] is transformers
    assert "deepspeed" not in sys.modules or sys.modules["deepspeed"] is not None


def run(text: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.slow
def test_the_runner_comes_without_them_unless_one_is_named():
    report = "; print([m for m in ('bitsandbytes', 'transformers') if m in sys.modules])"
    start = "import sys; from xtuner.engine.startup import import_runner; import_runner"
    assert run(f"{start}('AdamW'){report}") == "[]"
    assert "transformers" in run(f"{start}('Adafactor'){report}")
