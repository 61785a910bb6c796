"""What the guide says about the catalogue is so."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from xtuner.configs.datasets import DATASETS
from xtuner.configs.names import parse
from xtuner.configs.unknown import UnknownConfig
from xtuner.entry_point import main
from xtuner.utils.lang import translate

DOCS = Path(__file__).parents[2] / "docs"
LANGUAGES = ("en", "zh_cn")


def guide(language: str) -> str:
    return (DOCS / language / "configs.md").read_text("utf-8")


@pytest.mark.parametrize("language", LANGUAGES)
def test_its_commands_work(language: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```shell\n(.*?)```", guide(language), re.DOTALL)
    commands = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    ours = [words for words in commands if words[1] in ("list-cfg", "copy-cfg")]
    assert ours
    for _, *words in ours:
        assert main(words) == 0, words
    trained = [words[2] for words in commands if words[1] == "train"]
    assert all(Path(path).is_file() for path in trained)


@pytest.mark.parametrize("language", LANGUAGES)
def test_it_names_every_dataset_that_is_for_all_models(language: str) -> None:
    named = set(re.findall(r"`(\w+)`", guide(language)))
    special = ("finetune_", "w_", "intern_repo", "stack_exchange", "skypile")
    usual = {name for name in DATASETS if not name.startswith(special)}
    assert usual <= named, usual - named


@pytest.mark.parametrize("language", LANGUAGES)
def test_its_example_of_nonsense_is_answered_as_it_says(
    language: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XTUNER_LANG", language)
    with pytest.raises(UnknownConfig) as caught:
        parse("qwen2_5_7b_dpo_lora")
    error = caught.value
    assert translate(error.message, **error.values) in guide(language)
    assert error.suggestions[0] in guide(language)
