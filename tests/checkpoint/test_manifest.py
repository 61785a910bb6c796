"""A manifest tells intact checkpoints from damaged ones, and a bad manifest hides none."""

import json
import time

import pytest
import torch

from tests.checkpoint.test_checkpoint import flip_a_bit, state
from xtuner.checkpoint.checkpoint import find_latest, save_checkpoint

ENTRY = {"size": 1, "sha256": "0"}
BAD_MANIFESTS = {
    "cut": "{",
    "empty": "",
    "binary": "\udcff\udcfe",
    "number": "5",
    "list": "[]",
    "no files": "{}",
    "files null": '{"files": null}',
    "no entries": '{"files": {}}',
    "entry empty": '{"files": {"iter_8.pth": {}}}',
    "entry null": '{"files": {"iter_8.pth": null}}',
    "of another": json.dumps({"files": {"iter_4.pth": ENTRY}}),
    "of two": json.dumps({"files": {"iter_8.pth": ENTRY, "iter_4.pth": ENTRY}}),
    "size in quotes": '{"files": {"iter_8.pth": {"size": "1", "sha256": "0"}}}',
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("name", BAD_MANIFESTS)
def test_beside_a_bad_manifest_the_checkpoint_itself_is_read(tmp_path, name, capsys):
    save_checkpoint(tmp_path / "iter_4.pth", state(4))
    save_checkpoint(tmp_path / "iter_8.pth", state(8))
    text = BAD_MANIFESTS[name].encode("utf-8", "surrogateescape")
    (tmp_path / "iter_8.pth.json").write_bytes(text)
    assert find_latest(tmp_path) == tmp_path / "iter_8.pth"
    assert "the checkpoint itself is read" in capsys.readouterr().err
    flip_a_bit(tmp_path / "iter_8.pth")
    assert find_latest(tmp_path) == tmp_path / "iter_4.pth"


@pytest.mark.parametrize("when", ['"x"', "null", "NaN", "[]"])
def test_a_bad_time_in_a_manifest_hides_nothing(tmp_path, when):
    for number in (4, 8):
        save_checkpoint(tmp_path / f"iter_{number}.pth", state(number))
    manifest = tmp_path / "iter_8.pth.json"
    saved = json.loads(manifest.read_text())["saved_at"]
    manifest.write_text(manifest.read_text().replace(str(saved), when))
    assert find_latest(tmp_path) == tmp_path / "iter_8.pth"


def test_the_newest_has_the_most_iterations_whatever_the_clock_says(tmp_path, capsys, monkeypatch):
    save_checkpoint(tmp_path / "iter_35.pth", state(35))
    assert find_latest(tmp_path) == tmp_path / "iter_35.pth"
    assert not capsys.readouterr().err
    now = time.time()
    monkeypatch.setattr("xtuner.checkpoint.manifest.time.time", lambda: now - 3600)
    save_checkpoint(tmp_path / "iter_40.pth", state(40))
    assert find_latest(tmp_path) == tmp_path / "iter_40.pth"
    assert "iter_40.pth has the most iterations, although iter_35.pth" in capsys.readouterr().err
    assert find_latest(tmp_path / "nowhere") is None


def test_checkpoints_by_epoch_are_compared_by_iterations(tmp_path):
    save_checkpoint(tmp_path / "iter_35.pth", state(35))
    save_checkpoint(tmp_path / "epoch_2.pth", state(40))
    assert find_latest(tmp_path) == tmp_path / "epoch_2.pth"
    for number in (9, 10):  # without manifests their numbers count
        torch.save(state(number), tmp_path / f"epoch_{number}.pth")
    for file in ("iter_35.pth", "epoch_2.pth"):
        (tmp_path / file).unlink()
    assert find_latest(tmp_path) == tmp_path / "epoch_10.pth"
