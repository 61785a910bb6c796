"""The quickstart, resumed, equals the one left in peace: full, LoRA, QLoRA; packed or not."""

import shutil
from itertools import product

import pytest
import torch
from transformers import AutoTokenizer

from tests.equivalence.runs import make_small_base, train, train_on_ranks
from tests.helpers.tiers import few_fast
from xtuner.entry_point import main
from xtuner.proving.outcome import differences, outcome

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

CONFIGS = ("quickstart", "quickstart_lora", "quickstart_qlora")
PACKING = {
    "packed": [],
    "unpacked": ["pack_to_max_length=False", "use_varlen_attn=False", "max_length=128"],
}


@pytest.fixture(autouse=True)
def folder_with_a_small_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    make_small_base(tmp_path)


@pytest.mark.parametrize(
    ("config", "packing"), few_fast(product(CONFIGS, PACKING), [("quickstart_qlora", "packed")])
)
def test_resumed_equals_uninterrupted(tmp_path, config, packing):
    if config.endswith("qlora"):
        pytest.importorskip("bitsandbytes")
    assert_resumed_equals_uninterrupted(config, tmp_path, PACKING[packing])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["AdamW8bit", "PagedAdamW32bit"])
def test_resumed_equals_uninterrupted_with_other_optimizers(tmp_path, optimizer):
    pytest.importorskip("bitsandbytes")
    assert main(["copy-cfg", "quickstart", "."]) == 0
    config = tmp_path / "quickstart_copy.py"
    text = config.read_text().replace("optim_type = AdamW", f"optim_type = {optimizer}")
    config.write_text(f"from bitsandbytes.optim import {optimizer}\n{text}")
    state = assert_resumed_equals_uninterrupted(config, tmp_path, [])["optimizer"]["state"][0]
    kept = state.get("__bnb_optimizer_quant_state__", state)
    assert kept["state1"].dtype == (torch.uint8 if "8bit" in optimizer else torch.float32)


def assert_resumed_equals_uninterrupted(config, folder, more):
    options = ["train_cfg.max_epochs=None", "train_cfg.max_iters=6", "save_steps=2"]
    options += ["save_total_limit=-1", "evaluation_freq=3", *more]
    options += ["custom_hooks.1.max_new_tokens=4"]  # an untrained model would go on for long
    status, printed = train(config, folder / "whole", "--cfg-options", *options)
    assert status == 0, printed
    (folder / "resumed").mkdir()
    for name in ("iter_2.pth", "iter_2.pth.json", "metrics.jsonl"):
        shutil.copy(folder / "whole" / name, folder / "resumed")
    status, printed = train(config, folder / "resumed", "--resume", "--cfg-options", *options)
    assert status == 0, printed
    expected = outcome(folder / "whole")
    found = list(differences(expected, outcome(folder / "resumed")))
    assert not found, found
    return expected


@pytest.mark.slow
def test_resumed_equals_uninterrupted_with_two_processes(tmp_path):
    options = ["train_cfg.max_epochs=None", "train_cfg.max_iters=4", "save_steps=2"]
    options += ["save_total_limit=-1", "custom_hooks.1.max_new_tokens=2"]
    (tmp_path / "resumed").mkdir()
    for folder, words in (("whole", []), ("resumed", ["--resume"])):
        words = ["quickstart_lora", "--work-dir", tmp_path / folder, *words]
        printed, _ = train_on_ranks(2, [[*words, "--cfg-options", *options]], tmp_path, tmp_path)
        if folder == "whole":
            for name in ("iter_2.pth", "iter_2.pth.json", "metrics.jsonl"):
                shutil.copy(tmp_path / "whole" / name, tmp_path / "resumed")
    assert "Resuming from" in printed
    found = list(differences(outcome(tmp_path / "whole"), outcome(tmp_path / "resumed")))
    assert not found, found


def test_another_tokenizer_is_noticed(tmp_path):
    options = ["train_cfg.max_epochs=None", "train_cfg.max_iters=2", "save_steps=1"]
    options += ["custom_hooks.1.max_new_tokens=2"]
    status, printed = train("quickstart_lora", tmp_path / "run", "--cfg-options", *options)
    assert status == 0, printed
    tokenizer = AutoTokenizer.from_pretrained("work_dirs/quickstart_base")
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained("work_dirs/quickstart_base")
    words = ["--resume", "--cfg-options", *options]
    status, printed = train("quickstart_lora", tmp_path / "run", *words)
    assert status == 1 and "  tokenizer: vocabulary or settings" in printed, printed
    assert "--resume-allow tokenizer" in printed
