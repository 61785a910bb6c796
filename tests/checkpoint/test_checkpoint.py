"""Checkpoints survive kills and bit flips, and say what they are."""

import json
import os
from pathlib import Path

import pytest
import torch

from tests.helpers.checkpoints import RunsCode, state
from xtuner.checkpoint import checkpoint
from xtuner.checkpoint.checkpoint import (
    config_beside,
    find_latest,
    load_checkpoint,
    load_state_dict,
    remove,
    remove_leftovers,
    save_checkpoint,
)
from xtuner.checkpoint.serialize import mmengine_hub, to_serializable
from xtuner.utils.errors import UserError


def test_what_is_saved_comes_back_as_plain_data(tmp_path):
    save_checkpoint(tmp_path / "iter_4.pth", state())
    loaded = load_checkpoint(tmp_path / "iter_4.pth")
    assert torch.equal(loaded["state_dict"]["llm.a"], torch.arange(2000.0))
    assert loaded["optimizer"]["state"][0]["step"] == 4
    assert type(loaded["message_hub"]["runtime_info"]["best_score"]) is float
    hub = mmengine_hub(loaded["message_hub"])
    assert hub["log_scalars"]["train/loss"].mean() == 1.75
    torch.load(tmp_path / "iter_4.pth", weights_only=True)  # needs no list of allowed names


def test_the_manifest_has_the_checksum_of_the_file(tmp_path):
    import hashlib

    save_checkpoint(tmp_path / "iter_4.pth", state())
    manifest = json.loads((tmp_path / "iter_4.pth.json").read_text())
    noted = manifest["files"]["iter_4.pth"]
    data = (tmp_path / "iter_4.pth").read_bytes()
    assert noted == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest["iter"] == 4


def test_weights_only_are_read_from_either_form(tmp_path):
    save_checkpoint(tmp_path / "iter_4.pth", state())
    torch.save({"llm.a": torch.zeros(2)}, tmp_path / "weights.pth")
    assert set(load_state_dict(tmp_path / "iter_4.pth")) == {"llm.a", "llm.b"}
    assert set(load_state_dict(tmp_path / "weights.pth")) == {"llm.a"}


def test_a_state_dict_that_is_none_is_said(tmp_path):
    torch.save({"state_dict": 3}, tmp_path / "iter_1.pth")
    with pytest.raises(UserError, match="state_dict is no dict"):
        load_state_dict(tmp_path / "iter_1.pth")


def test_a_checkpoint_of_v0_1_loads_with_its_history_buffers(tmp_path):
    torch.save(state(9), tmp_path / "iter_9.pth")  # as mmengine did: pickled objects and getattr
    loaded = load_checkpoint(tmp_path / "iter_9.pth")
    hub = mmengine_hub(loaded["message_hub"])
    assert hub["log_scalars"]["train/loss"].data[0].tolist() == [2.0, 1.5]
    assert find_latest(tmp_path) == tmp_path / "iter_9.pth"


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[data.index(torch.arange(2000.0).numpy().tobytes()) + 4001] ^= 1
    file.write_bytes(data)


def cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path) -> None:
    os.truncate(file, 0)


@pytest.mark.parametrize("harm", [flip_a_bit, cut_short, empty])
@pytest.mark.parametrize("with_manifest", [True, False])
def test_a_damaged_one_is_named_and_the_one_before_is_used(tmp_path, harm, with_manifest):
    save_checkpoint(tmp_path / "iter_4.pth", state(4))
    save_checkpoint(tmp_path / "iter_8.pth", state(8))
    harm(tmp_path / "iter_8.pth")
    if not with_manifest:
        (tmp_path / "iter_8.pth.json").unlink()
    said: list[str] = []
    assert find_latest(tmp_path, report=said.append) == tmp_path / "iter_4.pth"
    assert len(said) == 1 and "iter_8.pth is damaged" in said[0]
    with pytest.raises(UserError, match="cannot be used"):
        load_checkpoint(tmp_path / "iter_8.pth")


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_checkpoint(tmp_path / "iter_4.pth")


def test_killed_between_the_two_renames_it_is_still_good(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "iter_4.pth", state(4))

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_manifest", killed)
    changed = state(4)
    changed["state_dict"]["llm.a"] += 1  # an older manifest would not fit
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "iter_4.pth", changed)
    assert find_latest(tmp_path) == tmp_path / "iter_4.pth"
    assert load_state_dict(tmp_path / "iter_4.pth")["llm.a"][0] == 1


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    half = tmp_path / ".iter_8.pth.abc123"
    half.mkdir()
    (half / "iter_8.pth").write_bytes(b"half")
    save_checkpoint(tmp_path / "iter_4.pth", state())
    remove_leftovers(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["iter_4.pth", "iter_4.pth.json"]


def test_a_folder_of_that_name_is_replaced(tmp_path):
    """An empty one, or the checkpoint of an earlier run with several processes."""
    path = tmp_path / "iter_4.pth"
    (path / "shards").mkdir(parents=True)
    save_checkpoint(path, state())
    assert find_latest(tmp_path) == path and path.is_file()
    assert {entry.name for entry in tmp_path.iterdir()} == {"iter_4.pth", "iter_4.pth.json"}


def test_an_empty_folder_is_no_checkpoint(tmp_path, capsys):
    save_checkpoint(tmp_path / "iter_4.pth", state())
    (tmp_path / "iter_5.pth").mkdir()
    assert find_latest(tmp_path) == tmp_path / "iter_4.pth"
    assert "iter_5.pth is damaged and is skipped: it is no checkpoint: empty" in (
        capsys.readouterr().err
    )


def test_what_is_not_data_cannot_be_saved(tmp_path):
    with pytest.raises(TypeError, match=r"meta\.tokenizer is a .*RunsCode"):
        save_checkpoint(tmp_path / "x.pth", {"meta": {"tokenizer": RunsCode(tmp_path)}})


def test_a_view_does_not_drag_its_whole_tensor_along():
    whole = torch.zeros(10_000)
    assert to_serializable(whole[:10]).untyped_storage().nbytes() == 40
    tied = to_serializable({"a": whole, "b": whole})
    assert tied["a"].data_ptr() == tied["b"].data_ptr()


def test_the_config_beside_is_found(tmp_path):
    assert config_beside(tmp_path / "iter_4.pth") is None
    (tmp_path / "my_config.py").write_text("model = dict(type='x')\n")
    (tmp_path / "my_map.py").write_text("def my_map_fn(row):\n    return row\n")
    assert config_beside(tmp_path / "iter_4.pth") == tmp_path / "my_config.py"
    (tmp_path / "later.py").write_text("model = dict(type='y')\n")
    (tmp_path / "run.json").write_text('{"config": "my_config.py"}')
    assert config_beside(tmp_path / "iter_4.pth") == tmp_path / "my_config.py"


@pytest.mark.parametrize("record", ["{", "[5]", '{"config": 5}', '{"config": "../other.py"}'])
def test_a_damaged_record_names_no_config(tmp_path, record):
    run = tmp_path / "run"
    run.mkdir()
    for file in (run / "my_config.py", tmp_path / "other.py"):
        file.write_text("model = dict(type='x')\n")
    (run / "run.json").write_text(record)
    assert config_beside(run / "iter_4.pth") == run / "my_config.py"


@pytest.mark.parametrize("is_folder", [True, False])
def test_of_a_link_to_a_checkpoint_the_link_is_removed(tmp_path, is_folder):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir() if is_folder else elsewhere.touch()
    (tmp_path / "iter_4.pth").symlink_to(elsewhere)
    remove(tmp_path / "iter_4.pth")
    assert [file.name for file in tmp_path.iterdir()] == ["elsewhere"]


def test_a_link_to_nothing_hides_no_checkpoint(tmp_path, capsys):
    save_checkpoint(tmp_path / "iter_4.pth", state(4))
    (tmp_path / "iter_8.pth").symlink_to(tmp_path / "nowhere")
    assert find_latest(tmp_path) == tmp_path / "iter_4.pth"
    assert "iter_8.pth is damaged and is skipped: it does not exist" in capsys.readouterr().err
