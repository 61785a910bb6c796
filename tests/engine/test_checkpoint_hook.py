"""When checkpoints are written, which are kept, and what is exported beside them."""

import time

import pytest
import torch

from tests.equivalence.runs import ROOT, TOY, train
from xtuner.checkpoint.checkpoint import load_checkpoint
from xtuner.engine.stop import SAVE, Stop

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def run(folder, *options: str) -> str:
    status, printed = train(TOY, folder, "--cfg-options", "max_epochs=1", *options)
    assert status == 0, printed
    return printed


def names(folder) -> list[str]:
    return sorted(file.name for file in folder.glob("*.pth"))


def test_the_best_is_kept_beside_the_last(tmp_path):
    run(tmp_path, "default_hooks.checkpoint.save_best=loss", "train_cfg.val_interval=2")
    best = [name for name in names(tmp_path) if name.startswith("best_loss_iter_")]
    assert len(best) == 1 and (tmp_path / f"{best[0]}.json").exists()
    assert len(list(tmp_path.glob("best_*"))) == 2  # the manifests of former bests are gone too
    hub = load_checkpoint(tmp_path / "iter_11.pth")["message_hub"]
    assert hub["runtime_info"]["best_ckpt"].endswith(best[0])
    assert "optimizer" not in load_checkpoint(tmp_path / best[0])


def test_without_the_optimizer(tmp_path):
    run(tmp_path, "default_hooks.checkpoint.save_optimizer=False")
    assert "optimizer" not in load_checkpoint(tmp_path / "iter_11.pth")


def test_another_folder_for_checkpoints(tmp_path):
    run(tmp_path / "run", f"default_hooks.checkpoint.out_dir={tmp_path / 'big_disk'}")
    assert names(tmp_path / "big_disk" / "run") == ["iter_11.pth", "iter_8.pth"]


def test_near_the_end_of_a_slurm_job_one_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 60))
    options = ["--cfg-options", "default_hooks.checkpoint.save_before=120"]
    status, printed = train(TOY, tmp_path, *options)
    assert status == 75 and "the time limit is near: stopped after iteration 2" in printed
    assert names(tmp_path) == ["iter_2.pth"]


def test_usr1_writes_one_and_the_run_goes_on(tmp_path, monkeypatch):
    asked = [SAVE]
    monkeypatch.setattr(Stop, "agreed", lambda self: asked.pop() if asked else None)
    run(tmp_path, "default_hooks.checkpoint.interval=500")
    assert names(tmp_path) == ["iter_11.pth", "iter_2.pth"]


def test_a_full_disk_ends_the_run_with_the_good_one_intact(tmp_path, monkeypatch):
    from tests.checkpoint.test_io import FullDisk
    from xtuner.checkpoint import checkpoint
    from xtuner.checkpoint.checkpoint import find_corruption

    whole, saved = checkpoint._HashingWriter, []

    def second_finds_no_room(stream):
        saved.append(stream)
        return whole(FullDisk(stream, 5000)) if len(saved) > 1 else whole(stream)

    monkeypatch.setattr(checkpoint, "_HashingWriter", second_finds_no_room)
    status, printed = train(TOY, tmp_path, "--cfg-options", "save_total_limit=1")
    assert status == 1 and "No space left on device" in printed and "Traceback" not in printed
    assert names(tmp_path) == ["iter_4.pth"] and find_corruption(tmp_path / "iter_4.pth") is None


EXPORT = """
from xtuner.engine.hooks.hf_checkpoint_hook import HFCheckpointHook

custom_hooks = [dict(type=HFCheckpointHook, every_save=True)]
"""


def test_exports_at_each_save_and_at_the_end(tmp_path):
    config = tmp_path / "export.py"
    config.write_text(TOY.read_text() + EXPORT)
    status, printed = train(config, tmp_path / "run", "--cfg-options", "max_epochs=1")
    assert status == 0, printed
    folders = sorted(folder.name for folder in (tmp_path / "run").glob("hf_model*"))
    assert folders == ["hf_model", "hf_model_iter_11", "hf_model_iter_4", "hf_model_iter_8"]
    final = load_checkpoint(tmp_path / "run" / "iter_11.pth")["state_dict"]
    for folder in ("hf_model", "hf_model_iter_11"):
        weights = torch.load(tmp_path / "run" / folder / "model.bin", weights_only=True)
        assert all(torch.equal(weights[name], final[name]) for name in final)


def test_an_export_does_not_replace_somebody_elses_folder(tmp_path):
    config = tmp_path / "export.py"
    config.write_text(
        TOY.read_text() + EXPORT.replace("every_save=True", f"out_dir={str(tmp_path)!r}")
    )
    status, printed = train(config, tmp_path / "run")
    assert status == 1 and "would replace this folder" in printed
    assert config.exists()
