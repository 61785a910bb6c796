"""The reference of DPO: precomputed equals live, on all data and however the model is sharded."""

import math
from itertools import product

import pytest
import torch

from tests.e2e.test_printed_commands import PRINTED, run_printed
from tests.equivalence.runs import train, train_on_ranks
from tests.helpers.tiers import few_fast
from tests.helpers.tiny import save_tiny
from xtuner.model import dpo
from xtuner.proving.outcome import metrics

CONFIG = "tests/engine/dpo_config.py"
LIVE, PRECOMPUTED = "precomputed=False", "precomputed=True"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("reference") / "base")


def run(base, work_dir, *options, words=()):
    words = ("--overwrite", *words, "--cfg-options", f"base={base}", *options)
    status, printed = train(CONFIG, work_dir, *words)
    assert status == 0, printed
    return printed


def assert_same(one, other):
    assert len(metrics(one)) == len(metrics(other)) > 0
    for a, b in zip(metrics(one), metrics(other), strict=True):
        for name in ("iter", "epoch"):  # in micro-batches of a rank
            a.pop(name, None), b.pop(name, None)
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("adapter", [False, True])
def test_precomputed_equals_live_on_training_and_validation_data(base, tmp_path, adapter):
    """Validation pairs are not those of the training, and there are more of them."""
    options = [f"adapter={adapter}"]
    run(base, tmp_path / "live", LIVE, *options)
    run(base, tmp_path / "ahead", PRECOMPUTED, *options)
    assert_same(tmp_path / "live", tmp_path / "ahead")
    assert "val/loss" in metrics(tmp_path / "ahead")[-1]


WAYS = {
    "ddp": [],
    "fsdp": ["--fsdp"],
    "zero2": ["--deepspeed", "deepspeed_zero2"],
    "zero3": ["--deepspeed", "deepspeed_zero3"],  # the last: a process keeps it in mind
}


@pytest.mark.slow
def test_precomputed_on_two_processes_equals_live_on_one(base, tmp_path):
    """Eleven pairs, thirteen to validate on: one of two ranks has a batch less."""
    for adapter in (False, True):
        run(base, tmp_path / f"{adapter}", LIVE, f"adapter={adapter}", "accumulative_counts=2")
    names = [(adapter, way) for way in WAYS for adapter in (False, True)]
    runs = [
        [
            *(CONFIG, "--work-dir", str(tmp_path / f"{adapter}_{way}"), *WAYS[way]),
            *("--cfg-options", f"base={base}", PRECOMPUTED, f"adapter={adapter}"),
        ]
        for adapter, way in names
    ]
    said, _ = train_on_ranks(2, runs, tmp_path)
    for adapter, way in names:
        assert_same(tmp_path / f"{adapter}", tmp_path / f"{adapter}_{way}")
    for folder in ("False_fsdp", "True_zero2", "False_zero3"):
        printed = [command for command in PRINTED.findall(said) if f"/{folder}/" in command]
        *_, chat = run_printed("\n".join(printed)).values()
        assert "assistant: " in chat


def test_values_of_other_pairs_are_not_taken(base, tmp_path):
    run(base, tmp_path / "run", PRECOMPUTED)
    printed = run(base, tmp_path / "run", PRECOMPUTED, "seed_of_pairs=5")
    assert "computing the reference" in printed
    run(base, tmp_path / "live", LIVE, "seed_of_pairs=5")
    assert_same(tmp_path / "live", tmp_path / "run")


def test_values_of_the_same_pairs_are_computed_once(base, tmp_path):
    run(base, tmp_path / "run", PRECOMPUTED)
    assert "computing the reference" not in run(base, tmp_path / "run", PRECOMPUTED)


def test_values_of_another_base_at_the_same_path_are_not_taken(base, tmp_path):
    save_tiny(tmp_path / "base")
    run(tmp_path / "base", tmp_path / "run", PRECOMPUTED)
    save_tiny(tmp_path / "base", initializer_range=0.04)
    assert "computing the reference" in run(tmp_path / "base", tmp_path / "run", PRECOMPUTED)


def test_changed_pairs_are_noticed_when_resuming(base, tmp_path):
    run(base, tmp_path / "run", LIVE)
    words = ["--resume", "--cfg-options", f"base={base}", "train_dataloader.dataset.seed=5"]
    status, printed = train(CONFIG, tmp_path / "run", "--resume-allow", "config", *words)
    assert status == 1 and "data: rows have another content" in printed


@pytest.mark.parametrize(
    ("start_from", "precomputed"),
    few_fast(
        product(["load_from, full", "load_from, adapter", "peft_model"], [LIVE, PRECOMPUTED]),
        [("load_from, full", LIVE), ("peft_model", PRECOMPUTED)],
    ),
)
def test_the_reference_is_the_model_before_training(base, tmp_path, start_from, precomputed):
    """At the first step the policy is the reference, so the loss is ln 2 and rewards are 0."""
    options = [f"adapter={start_from != 'load_from, full'}"]
    run(base, tmp_path / "first", LIVE, "steps=4", *options)
    checkpoint = tmp_path / "first" / "iter_4.pth"
    if start_from == "peft_model":
        from xtuner.entry_point import main

        config = str(tmp_path / "first" / "dpo_config.py")
        typed = ["convert", "pth_to_hf", config, str(checkpoint), str(tmp_path / "hf")]
        assert main(typed) == 0
        options = [f"peft_model={tmp_path / 'hf'}"]
    else:
        options.append(f"load_from={checkpoint}")
    run(base, tmp_path / "second", precomputed, *options)
    first = metrics(tmp_path / "second")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["reward_margin"] == pytest.approx(0, abs=1e-5)
    assert metrics(tmp_path / "second")[2]["loss"] != pytest.approx(math.log(2), abs=1e-5)
    resume = ["--resume", str(tmp_path / "second" / "iter_2.pth")]
    run(base, tmp_path / "resumed", precomputed, *options, words=resume)
    assert metrics(tmp_path / "resumed") == metrics(tmp_path / "second")[2:]


@pytest.mark.parametrize("adapter", few_fast([False, True], [True]))
def test_another_reference_is_noticed_at_the_first_step(base, tmp_path, adapter, monkeypatch):
    """One that is not the model as it is when training begins; dropout makes no difference."""
    warnings = []
    monkeypatch.setattr(dpo.logger, "warning", lambda *words: warnings.append(words[0]))
    dropout = ["model.lora.lora_dropout=0.5"] if adapter else []
    options = [LIVE, f"adapter={adapter}", "steps=2", *dropout]
    run(base, tmp_path / "right", *options)
    assert not warnings
    right = dpo.DPO.compare_start

    def changed(model: dpo.DPO) -> None:
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(3 * torch.randn_like(weight) * weight.requires_grad)
        right(model)

    monkeypatch.setattr(dpo.DPO, "compare_start", changed)
    run(base, tmp_path / "wrong", *options)
    (warning,) = warnings
    assert "The reference is not the model before training" in warning
