"""``xtuner log-dataset``: any sample in order, coloured where it is trained."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from tests.helpers.tiny import make_tokenizer
from xtuner.doctor.show import html_page, print_sample, sample_html, show_sample
from xtuner.entry_point import main
from xtuner.tools.log_dataset import masked_text, tokens_of
from xtuner.utils.errors import UserError

CONFIG = """
from rows_to_log import make
from transformers import AutoTokenizer

tokenizer = dict(type=AutoTokenizer.from_pretrained, pretrained_model_name_or_path={model!r})
train_dataloader = dict(dataset=dict(type=make, tokenizer=tokenizer))
"""

ROWS = '''
from xtuner.registry import BUILDER


def make(tokenizer):
    """Two samples; the second is a pack of two rows."""
    tokenizer = BUILDER.build(tokenizer)

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    ask, say = ids("What is it?"), ids("A test.")
    one = {"input_ids": ask + say, "labels": [-100] * len(ask) + say}
    pack = {key: values * 2 for key, values in one.items()}
    size = len(ask + say)
    return [one, {**pack, "cumulative_len": [0, size, 2 * size], "rows": [4, 9]}]
'''


@pytest.fixture
def config(tmp_path, tiny_llama, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "rows_to_log", raising=False)
    (tmp_path / "rows_to_log.py").write_text(ROWS)
    file = tmp_path / "config.py"
    file.write_text(CONFIG.format(model=str(tiny_llama)))
    return str(file)


def test_masked_text_keeps_the_order(config, capsys):
    assert main(["log-dataset", config, "--show", "masked_text"]) == 0
    out = capsys.readouterr().out.strip()
    assert out.endswith("[-100]A test.")
    assert out.startswith("[-100]")
    assert "What" not in out


def test_shows_ids_and_labels_of_any_sample(config, capsys):
    assert main(["log-dataset", config, "--index", "-1", "--show", "all"]) == 0
    out = capsys.readouterr().out
    assert out.count("[[A test.]]") == 2
    assert "1/2 make:5 ·" in out
    assert "2/2 make:10 ·" in out
    lines = {line.partition(":")[0]: line for line in out.splitlines()}
    ids, labels = (lines[name].split("[")[1].split(", ") for name in ("input_ids", "labels"))
    assert len(ids) == len(labels)
    assert 0 < labels.count("-100") < len(labels)


def test_an_index_too_high_is_refused(config, capsys):
    assert main(["log-dataset", config, "--index", "2"]) == 1
    assert "there is no sample 2: the dataset has 2" in capsys.readouterr().err


def test_html_is_one_file_with_trained_text_marked(config, tmp_path, capsys):
    page = tmp_path / "out.html"
    assert main(["log-dataset", config, "--index", "1", "--html", str(page)]) == 0
    text = page.read_text("utf-8")
    assert text.count('<span class="trained">A test.</span>') == 2
    assert text.count('<div class="row">') == 2
    assert "http" not in text


def shown(text: str, trained: list[bool]):
    tokenizer = make_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    labels = [token if wanted else -100 for token, wanted in zip(ids, trained, strict=False)]
    return show_sample("a sample", ids[: len(labels)], labels, tokenizer.decode)


def test_colours_in_a_terminal():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, color_system="standard")
    print_sample(shown("abc", [False, True, False]), console)
    assert "\x1b[1;32mb\x1b[0m" in out.getvalue()


def test_content_cannot_break_out():
    ids, labels = [1, 2], [1, 2]
    sample = show_sample("t", ids, labels, lambda ids: "<script>\x1b[2J")
    assert "<script>" not in html_page("<t>", sample_html(sample))
    out = io.StringIO()
    print_sample(sample, Console(file=out, width=80))
    assert "\x1b" not in out.getvalue()
    assert masked_text(ids, labels, lambda ids: "\x1b[2J") == "\\u001b[2J"


def test_images_in_the_ids_are_named():
    sample = show_sample("t", [5, -200, 6], [-100, -100, 6], lambda ids: f"<{ids[0]}>")
    assert [piece.text for piece in sample.rows[0].segments] == ["<5><image>", "<6>"]


def test_pairs_of_answers_stand_one_after_the_other():
    pair = {"chosen_ids": [1, 2], "chosen_labels": [-100, 2],
            "rejected_ids": [1, 3, 4], "rejected_labels": [-100, 3, 4]}  # fmt: skip
    assert tokens_of(pair) == ([1, 2, 1, 3, 4], [-100, 2, -100, 3, 4], [0, 2, 5])
    with pytest.raises(UserError, match="only pixel_values"):
        tokens_of({"pixel_values": []})
