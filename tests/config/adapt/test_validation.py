"""``val_size`` gives a run its validation data; where it cannot, that is said before the start."""

import pytest

from tests.equivalence.runs import make_small_base, train
from xtuner.config import load_config
from xtuner.proving.outcome import metrics


def options(*more):
    return ["train_cfg.max_epochs=None", "train_cfg.max_iters=4", "train_cfg.val_interval=2", *more]


@pytest.mark.parametrize("config", ["quickstart", "internlm_7b_qlora_oasst1_mmlu_e3"])
def test_val_size_is_a_setting_of_every_config(config):
    assert load_config(config, ["val_size=0.1"]).val_size == 0.1


def test_the_split_is_validated_at_intervals_and_at_the_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_small_base(tmp_path)
    words = ["--cfg-options", *options("val_size=0.1", "custom_hooks.1.max_new_tokens=2")]
    status, printed = train("quickstart", tmp_path / "run", *words)
    assert status == 0, printed
    measured = [line["iter"] for line in metrics(tmp_path / "run") if "val/loss" in line]
    assert measured == [2, 4] and "val_size=0.1: of each dataset" in printed
    # the config that lies beside the checkpoints runs as it is
    own = str(tmp_path / "run" / "quickstart.py")
    status, printed = train(own, tmp_path / "run", "--resume", "--cfg-options", *options())
    assert status == 0 and "4 of 4 iterations are done" in printed, printed


def test_data_that_cannot_be_split_is_refused(tmp_path):
    from tests.engine.toy import CONFIG

    config = tmp_path / "toy.py"
    config.write_text(CONFIG + "val_size = 0.1\n")
    status, printed = train(config, tmp_path / "run")
    assert status == 1 and "val_size: it splits data of process_hf_dataset" in printed
