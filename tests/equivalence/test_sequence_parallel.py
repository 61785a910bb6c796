"""A few steps of the real command: processes that share rows train what one process does."""

import pytest

from tests.equivalence.runs import train, train_on_ranks
from tests.helpers.tiers import slow
from xtuner.checkpoint.checkpoint import find_latest, load_state_dict
from xtuner.proving.outcome import metrics

CONFIG = "tests/equivalence/sequence_parallel_config.py"
KINDS = {
    "full": [],
    "lora": ["adapter=True", "packed=True"],
    "packed": ["packed=True"],
    "batch": ["batch_size=2"],
    "dpo": ["kind=dpo", "packed=True"],
    "dpo_lora_ahead": ["kind=dpo", "adapter=True", "ahead=True"],
    "orpo": ["kind=orpo"],
    "reward": ["kind=reward", "packed=True"],
}
PROCESSES, STEPS = 4, 4
# Kinds, and how many processes share a row; to four go six heads and three key heads unevenly.
SHARED = [(kind, 2, "") for kind in ("full", "lora", "batch", "dpo", "orpo")]
SHARED += [(kind, 4, "") for kind in ("lora", "packed", "dpo_lora_ahead", "reward")]
# Weights are sharded over all four. A process keeps ZeRO-3 in mind, so that comes last.
SHARED += [(kind, 2, "--fsdp") for kind in ("lora", "dpo", "reward")]
SHARED += [("packed", 2, "deepspeed_zero2")]
SHARED += [(kind, 2, "deepspeed_zero3") for kind in ("lora", "dpo", "reward")]
FAST = [("lora", 2, ""), ("packed", 4, ""), ("dpo", 2, "--fsdp")]
BOUND = 2e-6


def options(base, kind, size):
    ways = PROCESSES // size if size > 1 else 1
    words = [
        f"base={base}",
        f"sequence_parallel_size={size}",
        f"ways={ways}",
        f"steps={STEPS}",
        *KINDS[kind],
    ]
    return ["--cfg-options", *words]


def make_runs(folder, shared):
    """The runs: alone in this process, shared in four that are forked from it."""
    from tests.helpers.tiny import save_tiny

    heads = dict(hidden_size=48, head_dim=8, num_attention_heads=6, num_key_value_heads=3)
    base = save_tiny(folder / "base", **heads)
    for kind in dict.fromkeys(kind for kind, *_ in shared):
        status, printed = train(CONFIG, folder / f"{kind}_1", *options(base, kind, 1))
        assert status == 0, printed
    runs = []
    for kind, size, way in shared:
        words = ["--deepspeed", way] if way.startswith("deepspeed") else way.split()
        words += options(base, kind, size)
        runs.append([CONFIG, "--work-dir", folder / f"{kind}_{size}{way}", *words])
    train_on_ranks(PROCESSES, runs, folder)


def differences(alone, shared, steps=STEPS):
    """What two runs do not agree in."""
    lines = list(zip(metrics(alone), metrics(shared), strict=True))
    if len(lines) != steps + 1:
        yield f"{len(lines)} lines instead of {steps} steps and a validation"
    for one, other in lines:
        one.pop("iter"), other.pop("iter")  # micro-batches of a rank
        if one != pytest.approx(other, rel=2e-5, abs=2e-5):
            yield f"{one} and {other}"
    before, after = (load_state_dict(find_latest(folder)) for folder in (alone, shared))
    if before.keys() != after.keys():
        yield "names of weights"
    for name, weights in before.items():
        off = float((weights - after[name]).abs().max())
        if off >= BOUND:
            yield f"{name} by {off}"


# One test: the fixture of several would run in each of pytest's processes.
@pytest.mark.parametrize("shared", [FAST, slow(SHARED)], ids=["few", "all"])
def test_rows_that_are_shared_train_the_same(shared, tmp_path):
    make_runs(tmp_path, shared)
    off = [
        f"{kind}, {size} to a row, {way}: {difference}"
        for kind, size, way in shared
        for difference in differences(tmp_path / f"{kind}_1", tmp_path / f"{kind}_{size}{way}")
    ]
    assert not off, "\n".join(off)
