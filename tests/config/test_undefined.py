"""Names that a config does not define are all found, and what else is wrong is found with them."""

import pytest

from tests.errors.test_corpus import FOLDER
from xtuner.config.check import check

BASE = (FOLDER / "base" / "qlora.py").read_text("utf-8")


def found(tmp_path, *edits):
    text = BASE
    for old, new in edits:
        assert old in text
        text = text.replace(old, new, 1)
    config = tmp_path / "config.py"
    config.write_text(text, "utf-8")
    lines = text.splitlines()
    return [
        (p.code, lines[p.where.line - 1].strip(), p.hint) for p in check(config) if p.where.line
    ]


def test_a_misspelt_setting_does_not_hide_other_mistakes(tmp_path):
    problems = found(
        tmp_path, ("max_length = 2048", "max_lenght = 2048"), ("lora_alpha=16", "lora_alhpa=16")
    )
    assert problems[:2] == [
        ("XT0102", "lora_alhpa=16,  # scale of the adapters: lora_alpha / r", problems[0][2]),
        ("XT0001", "max_length=max_length,", "did you mean 'max_lenght'?"),
    ]
    assert "lora_alpha" in problems[0][2]
    assert len(problems) == 2


def test_every_undefined_name_is_found(tmp_path):
    problems = found(
        tmp_path,
        ("batch_size=batch_size", "batch_size=batchsize"),
        ("dataset_map_fn=alpaca_map_fn", "dataset_map_fn=nothing_like_it"),
    )
    assert [(line, hint) for _, line, hint in problems] == [
        ("dataset_map_fn=nothing_like_it,", None),
        ("batch_size=batchsize,", "did you mean 'batch_size'?"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "shares = [share for share in (1, 2)]",
        "half = (lambda whole: whole / 2)(4)",
        "def twice(number):\n    return number * len(evaluation_inputs)",
    ],
)
def test_names_of_inner_scopes_are_no_mistakes(tmp_path, line):
    problems = found(tmp_path, ("optim_type = AdamW", f"optim_type = AdamW\n{line}"))
    assert "XT0001" not in [code for code, _, _ in problems]


def test_names_from_a_base_config_are_not_judged(tmp_path):
    (tmp_path / "base.py").write_text(BASE, "utf-8")
    config = tmp_path / "child.py"
    config.write_text(
        "from mmengine.config import read_base\n\nwith read_base():\n    from .base import *\n"
        "model['use_activation_checkpointing'] = False\n",
        "utf-8",
    )
    assert "XT0001" not in [problem.code for problem in check(config)]
