"""Reward models: what they read, lose and keep."""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from tests.helpers.preference import batch, dataset, model, train
from tests.helpers.tiers import slow
from tests.helpers.tiny import make_tokenizer
from xtuner.model.modules import preference_losses
from xtuner.model.reward import RewardModel


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_the_penalty_of_rewards_is_a_mean_over_answers(tokenizer):
    data = batch(tokenizer, is_dpo=False, is_reward=True, reward_token_id=2)
    settings = dict(penalty_type="L2", penalty_weight=1.0)
    built = model(RewardModel, **settings)
    with torch.no_grad():
        built.v_head.weight.mul_(20)
    chosen, rejected = (side.detach() for side in built._rewards(data))
    penalty = torch.cat([chosen, rejected]).square().mean()
    found = built(data)["loss"] - preference_losses.ranking(chosen, rejected).mean()
    assert penalty > 0.1
    torch.testing.assert_close(found, penalty, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_reward_model_reads_the_reward_token(tokenizer, packed):
    built = model(RewardModel, loss_type="ranking", penalty_type="none")
    settings = dict(is_dpo=False, is_reward=True, reward_token_id=2)
    data = batch(tokenizer, packed, **settings)
    rewards = []
    for row in dataset(tokenizer, **settings):
        for side in ("chosen", "rejected"):
            ids = torch.tensor([row[f"{side}_ids"]])
            assert ids[0, -1] == 2
            hidden = built.llm.base_model(input_ids=ids).last_hidden_state
            rewards.append(built.v_head(hidden[0, -1])[0])
    chosen, rejected = torch.stack(rewards[::2]), torch.stack(rewards[1::2])
    expected = -logsigmoid(chosen - rejected).mean()
    found = built(data)
    torch.testing.assert_close(found["loss"], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["chosen_rewards"], chosen.mean(), rtol=1e-4, atol=1e-5)
    assert found["reward_acc"] == (chosen > rejected).float().mean()


def test_a_reward_model_keeps_its_head():
    built = model(RewardModel, lora=True)
    assert "v_head.weight" in built.state_dict()
    assert len(built.state_dict()) == 2 * 2 * 2 + 1


def test_all_that_a_reward_model_trains_gets_a_gradient(tokenizer):
    built = model(RewardModel)  # of an AutoModelForCausalLM, whose own head is not used
    data = batch(tokenizer, is_dpo=False, is_reward=True, reward_token_id=2)
    built(data)["loss"].backward()
    without = [n for n, p in built.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


@pytest.mark.parametrize("loss_type", ["ranking", "focal"])
@pytest.mark.parametrize("penalty", ["log_barrier", slow("L2"), slow("none")])
def test_reward_models_learn(tokenizer, loss_type, penalty):
    built = model(RewardModel, lora=True, loss_type=loss_type, penalty_type=penalty)
    data = batch(tokenizer, is_dpo=False, is_reward=True, reward_token_id=2)
    _, last = train(built, data)
    assert last["reward_acc"] == 1


def test_reward_losses_by_hand():
    chosen, rejected = torch.tensor([2.0]), torch.tensor([0.5])
    p = 1 / (1 + math.exp(-1.5))
    assert preference_losses.ranking(chosen, rejected).item() == pytest.approx(-math.log(p))
    focal = -((1 - 2 * (p - 0.5)) ** 2) * math.log(p)
    assert preference_losses.focal(chosen, rejected).item() == pytest.approx(focal, rel=1e-5)
    wall = -math.log(3) - math.log(7)
    assert preference_losses.log_barrier(chosen).item() == pytest.approx(wall, rel=1e-5)
    outside = torch.tensor([6.0], requires_grad=True)
    preference_losses.log_barrier(outside).backward()
    assert outside.grad.item() > 100  # it leads back
