"""What a run needs besides XTuner is missed by check-cfg, not after the data were prepared."""

from __future__ import annotations

from pathlib import Path

import pytest

from xtuner.config.check import packages
from xtuner.config.check.checker import check

BASE = Path(__file__).parents[2] / "errors" / "base" / "qlora.py"


def found(text: str, tmp_path: Path) -> list[tuple[str, str, str]]:
    config = tmp_path / "c.py"
    config.write_text(text)
    return [(p.code, p.message, p.hint) for p in check(config) if p.code in ("XT0340", "XT0341")]


def test_bitsandbytes_for_qlora(without, tmp_path):
    assert found(BASE.read_text(), tmp_path) == []
    without("bitsandbytes")
    ((code, message, hint),) = found(BASE.read_text(), tmp_path)
    assert (code, hint) == ("XT0340", "pip install bitsandbytes")
    assert "BitsAndBytesConfig needs the package 'bitsandbytes'" in message


@pytest.mark.parametrize("kind", [k for k in packages.PACKAGES if k.endswith("VisBackend")])
def test_backends_of_the_visualizer(kind, without, tmp_path):
    package = packages.PACKAGES[kind]
    without(package)
    text = BASE.read_text() + f"\nvisualizer = dict(vis_backends=[dict(type='{kind}')])\n"
    ((code, _, hint),) = found(text, tmp_path)
    assert (code, hint) == ("XT0340", f"pip install {package}")


def test_arguments_that_another_packages_builder_adds_are_no_error(tmp_path, monkeypatch):
    (tmp_path / "thirdparty19.py").write_text("class Head:\n    def __init__(self, norm): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    text = BASE.read_text() + (
        "\nfrom thirdparty19 import Head\nfrom torch.nn import GroupNorm\n"
        "custom_hooks = [dict(type=Head, norm=dict(type=GroupNorm, num_groups=1))]\n"
    )
    config = tmp_path / "c.py"
    config.write_text(text)
    assert not [p for p in check(config) if p.code == "XT0103"]


@pytest.mark.parametrize(("every", "is_wrong"), [(0, False), (-1, True), ("'a'", True)])
def test_an_evaluation_interval_of_0_means_never(every, is_wrong, tmp_path):
    config = tmp_path / "c.py"
    config.write_text(
        BASE.read_text() + f"\nevaluation_freq = {every}\ncustom_hooks[1]"
        f"['every_n_iters'] = {every}\n"
    )
    assert bool([p for p in check(config) if p.code == "XT0322"]) is is_wrong
