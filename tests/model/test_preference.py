"""DPO, ORPO, reward models: micro-batches add up, training prefers the chosen answers."""

import pytest
import torch

from tests.helpers.preference import batch, dataset, model, moved, train
from tests.helpers.tiers import few_fast
from tests.helpers.tiny import make_tokenizer
from xtuner.dataset.collate_fns import preference_collate_fn
from xtuner.model.dpo import DPO
from xtuner.model.modules import preference_losses
from xtuner.model.orpo import ORPO
from xtuner.model.reward import RewardModel
from xtuner.utils.errors import UserError

TRAINED = [
    *((DPO, dict(loss_type=name)) for name in preference_losses.DPO_LOSSES),
    (ORPO, dict(beta=1.0)),
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.mark.parametrize("kind", [DPO, ORPO, RewardModel])
def test_shares_of_micro_batches_add_up(tokenizer, kind):
    settings = {"is_dpo": False, "is_reward": True, "reward_token_id": 2}
    made = dataset(tokenizer, **(settings if kind is RewardModel else {}))
    built = moved(model(kind))
    whole = preference_collate_fn(list(made))["data"]
    parts = [preference_collate_fn([row])["data"] for row in made]
    num_items_in_batch = built.num_items(whole)
    assert num_items_in_batch == {
        key: sum(built.num_items(part)[key] for part in parts) for key in num_items_in_batch
    }
    shares = [built(part, num_items_in_batch=num_items_in_batch) for part in parts]
    for key, value in built(whole).items():
        added = sum(share[key] for share in shares)
        torch.testing.assert_close(added, value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "settings"),
    few_fast(TRAINED, TRAINED[::4]),
)
def test_training_prefers_the_chosen_answers(tokenizer, kind, settings):
    built = model(kind, lora=True, **settings)
    _, last = train(built, batch(tokenizer), steps=40)
    assert last["reward_acc"] == 1
    assert last["reward_margin"] > 0


def test_wrong_settings_are_named():
    with pytest.raises(UserError, match="sigmoyd"):
        model(loss_type="sigmoyd")
    with pytest.raises(UserError, match="label smoothing"):
        model(loss_type="ipo", label_smoothing=0.1)
    with pytest.raises(UserError, match="penalty_type 'l3'"):
        model(RewardModel, penalty_type="l3")
