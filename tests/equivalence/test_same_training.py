"""The real command trains the same however the work is divided: batches, ranks, checkpointing."""

import pytest
import torch

from tests.equivalence.runs import make_small_base, train, train_on_ranks
from tests.helpers.tiers import slow
from xtuner.entry_point import main
from xtuner.proving.outcome import differences, outcome

# Plain gradient descent in float32: the change of the weights is the gradient itself.
EDIT = """
from torch.optim import SGD

optim_wrapper["optimizer"] = dict(type=SGD, lr=0.5)
optim_wrapper["dtype"] = "float32"
optim_wrapper["clip_grad"] = None
param_scheduler = []
custom_hooks = []
train_dataset["pack_to_max_length"] = train_dataset["use_varlen_attn"] = False
train_dataset["remove_unused_columns"] = True
train_dataloader["collate_fn"]["use_varlen_attn"] = False
model["use_varlen_attn"] = False
train_cfg = dict(type=TrainLoop, max_iters=8)
randomness = dict(seed=0)
"""
BOUND = 2e-6  # of weights around 0.02; float32 sums in another order


@pytest.fixture(scope="module", params=[slow("quickstart"), "quickstart_lora"])
def config(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_small_base(folder)
        assert main(["copy-cfg", request.param, "."]) == 0
        file = folder / f"{request.param}_copy.py"
        text = file.read_text() + EDIT
        file.write_text(text.replace("lora_dropout=0.1", "lora_dropout=0.0"))
        yield file


def trained(config, name, *options):
    folder = config.parent / name
    words = ["--cfg-options", "accumulative_counts=4", "model.use_activation_checkpointing=False"]
    status, printed = train(config, folder, *words, *options)
    assert status == 0, printed
    return outcome(folder)["state_dict"]


@pytest.fixture(scope="module")
def reference(config):
    weights = trained(config, "reference")
    assert any(value.abs().max() > 1e-4 for key, value in weights.items() if "lora_B" in key) or (
        "lora" not in config.name
    )
    return weights


def largest(one, other):
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max()) for key in one)


def test_the_same_twice(config, reference):
    assert not list(differences(reference, trained(config, "again")))


def test_another_seed_is_another_training(config, reference):
    assert largest(reference, trained(config, "seed", "randomness.seed=1")) > 10 * BOUND


@pytest.mark.parametrize(("batch", "accumulate", "iterations"), [(4, 1, 2), (2, 2, 4)])
def test_batches_equal_accumulation(config, reference, batch, accumulate, iterations):
    options = [f"train_dataloader.batch_size={batch}", f"accumulative_counts={accumulate}"]
    weights = trained(config, f"batch_{batch}", *options, f"train_cfg.max_iters={iterations}")
    assert largest(reference, weights) < BOUND


def test_activation_checkpointing_changes_nothing(config, reference):
    weights = trained(config, "recomputed", "model.use_activation_checkpointing=True")
    assert largest(reference, weights) < BOUND


def test_two_processes_equal_one(config, reference, tmp_path):
    folder = config.parent / "two"
    options = ["accumulative_counts=2", "train_cfg.max_iters=4"]
    options.append("model.use_activation_checkpointing=False")
    words = [config, "--work-dir", folder, "--cfg-options", *options]
    train_on_ranks(2, [words], tmp_path, config.parent)
    weights = outcome(folder)["state_dict"]
    assert largest(reference, weights) < BOUND
    assert all(torch.isfinite(value).all() for value in weights.values())
