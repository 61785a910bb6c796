"""Too few optimizer steps: when it is said, and that the settings named give enough."""

from __future__ import annotations

import math
import re

import pytest

from xtuner.utils.few_steps import MIN_STEPS, few_steps_advice, few_steps_advice_of


def test_sixty_rows_with_the_accumulation_of_the_catalogue():
    assert few_steps_advice(60, 16, 60) == (
        "4 optimizer steps are few to learn from; for at least 20: accumulative_counts = 3"
    )
    assert few_steps_advice(4, 16, 4).endswith("accumulative_counts = 1, max_epochs = 5")
    assert few_steps_advice(4, 1, None).endswith(": max_iters = 20")
    assert few_steps_advice(320, 16, 1) is None
    assert few_steps_advice(305, 16, 1) is None  # the last step has one micro-batch


@pytest.mark.parametrize("rows", [1, 2, 7, 19, 20, 21, 39, 60, 300])
@pytest.mark.parametrize("accumulate", [1, 2, 16, 64])
@pytest.mark.parametrize("epochs", [0.5, 1, 3])
def test_the_settings_named_are_enough(rows, accumulate, epochs):
    micro_batches = math.ceil(rows * epochs)
    advice = few_steps_advice(micro_batches, accumulate, rows)
    if advice is None:
        assert math.ceil(micro_batches / accumulate) >= MIN_STEPS
        return
    assert math.ceil(micro_batches / accumulate) < MIN_STEPS
    set_to = {key: int(value) for key, value in re.findall(r"(\w+) = (\d+)", advice)}
    assert set_to
    then = math.ceil(rows * set_to.get("max_epochs", epochs))
    assert math.ceil(then / set_to.get("accumulative_counts", accumulate)) >= MIN_STEPS


@pytest.mark.parametrize(
    ("loop", "steps"),
    [
        ({"max_epochs": 3}, 12),
        ({"max_epochs": 0.5}, 2),
        ({"max_iters": 160}, 10),
        ({"max_epochs": 6}, None),
        ({"max_iters": 400}, None),
        ({"max_epochs": "many"}, None),
        ({}, None),
    ],
)
def test_a_run_that_is_not_built(loop, steps):
    batches = dict(train_dataloader=dict(batch_size=1), optim_wrapper=dict(accumulative_counts=16))
    advice = few_steps_advice_of(60, {**batches, "train_cfg": loop})
    assert (advice and int(advice.split()[0])) == steps
    if advice:
        assert ("one process" in advice) == ("max_epochs" in loop)
