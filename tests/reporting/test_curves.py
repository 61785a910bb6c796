"""Curves from metrics.jsonl: read, drawn, and in words."""

from __future__ import annotations

import json
import re
import struct

import pytest

from xtuner.entry_point import main
from xtuner.reporting.curves import draw, read_run, running_mean, text_curves


@pytest.fixture
def folder(tmp_path):
    lines = [
        {"iter": 2 * n, "loss": 4 / n, "lr": 1e-3 / n, "grad_norm": 1.0, "tokens_per_sec": 100.0}
        for n in range(1, 101)
    ]
    lines.append({"iter": 200, "val/loss": 0.5, "val/perplexity": 1.65})
    out = tmp_path / "a_run"
    out.mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (out / "metrics.jsonl").write_text(text + '{"iter": 202, "lo')  # killed while it wrote
    return out


def size(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG")
    return struct.unpack(">II", png[16:24])


def test_a_run_is_read_although_it_was_killed(folder):
    run = read_run(folder)
    assert run.name == "a_run"
    assert run.curves["loss"][0][-1] == 200
    assert len(run.curves["loss"][1]) == 100
    assert run.curves["val/loss"] == ([200], [0.5])


def test_the_picture_has_a_panel_for_each_number(folder, tmp_path):
    run = read_run(folder)
    draw([run], tmp_path / "one.png", names=("loss",))
    draw([run, run], tmp_path / "four.png", names=("loss", "lr", "grad_norm", "nothing"))
    one, four = ((tmp_path / f"{name}.png").read_bytes() for name in ("one", "four"))
    assert size(four) == (size(one)[0] * 2, size(one)[1] * 2)  # three panels in two rows


def test_the_command_draws_and_tells(folder, capsys):
    assert main(["plot", str(folder), str(folder), "--out", str(folder / "x.png")]) == 0
    said = capsys.readouterr().out
    assert "loss" in said
    assert "4 -> 0.04  [0.04, 4]" in said
    assert (folder / "x.png").exists()


def test_words_show_the_way_down(folder):
    (line,) = [text for text in text_curves(read_run(folder)) if text.strip().startswith("loss")]
    assert re.search("█[▃▄▅].*▂.*▁▁▁", line)


def test_a_folder_without_metrics(tmp_path, capsys):
    assert main(["plot", str(tmp_path)]) == 1
    assert "there is no metrics.jsonl in this folder" in capsys.readouterr().err


def test_the_mean_passes_over_what_is_not_finite():
    assert running_mean([1.0, float("nan"), 1.0], 0.9) == pytest.approx([1.0, 1.0, 1.0])


def test_rewards_of_preference_runs_are_drawn(tmp_path):
    lines = [
        {"iter": n, "loss": 1 / n, "reward_acc": n / 5, "reward_margin": float(n)}
        for n in range(1, 6)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(tmp_path)
    shown = "\n".join(text_curves(run))
    assert "reward accuracy" in shown
    assert "reward margin" in shown
    draw([run], tmp_path / "few.png", ["loss"])
    draw([run], tmp_path / "all.png")
    few, every = (size((tmp_path / f"{name}.png").read_bytes()) for name in ("few", "all"))
    assert every[0] > few[0]
    assert every[1] > few[1]
