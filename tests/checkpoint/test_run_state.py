"""Weights of another model are refused by name; only ``load_from`` may fit partly."""

import pytest
import torch
from torch import nn

from xtuner.checkpoint.rng import random_state, set_random_state
from xtuner.checkpoint.run_state import load_weights
from xtuner.utils.errors import UserError


def model(width: int = 4) -> nn.Module:
    return nn.ModuleDict({"a": nn.Linear(3, width), "b": nn.Linear(width, 2)})


def test_all_weights_get_their_value():
    source, target = model(), model()
    assert load_weights(target, source.state_dict()) == ""
    assert torch.equal(target["a"].weight, source["a"].weight)


def test_missing_and_left_over_names_are_said_at_once():
    weights = model().state_dict()
    weights["c.weight"] = weights.pop("b.weight")
    with pytest.raises(UserError, match=r"1 are missing, such as b.weight; 1 are not in the model"):
        load_weights(model(), weights)
    assert "c.weight" in load_weights(model(), weights, partly=True)


def test_another_shape_and_nothing_that_fits_are_refused_even_partly():
    with pytest.raises(UserError, match=r"size mismatch for a.weight"):
        load_weights(model(), model(5).state_dict(), partly=True)
    with pytest.raises(UserError, match="not in the model"):
        load_weights(model(), {"x": torch.zeros(1)}, partly=True)


def test_only_what_is_trained_must_be_there():
    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.adapter = nn.Linear(3, 3), nn.Linear(3, 3)

        def state_dict(self, *args, **kwargs):
            whole = super().state_dict(*args, **kwargs)
            return {name: value for name, value in whole.items() if "adapter" in name}

    assert load_weights(Adapter(), Adapter().state_dict()) == ""


def test_random_states_come_back():
    import random

    import numpy as np

    def draw() -> tuple:
        return random.random(), random.gauss(0, 1), np.random.rand(), torch.rand(3).tolist()

    draw()
    state = random_state()
    expected = draw()
    assert draw() != expected
    set_random_state(state)
    assert draw() == expected
