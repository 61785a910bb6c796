"""DPO, ORPO and reward models: equal to plain transformers, packed or not, and they learn."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.nn.functional import cross_entropy, log_softmax, logsigmoid

from tests.helpers.tiny import make_model, make_tokenizer
from xtuner.dataset.collate_fns import preference_collate_fn
from xtuner.dataset.preference_dataset import build_preference_dataset
from xtuner.model.dpo import DPO
from xtuner.model.modules import preference_losses
from xtuner.model.orpo import ORPO
from xtuner.model.reward import RewardModel
from xtuner.utils.errors import UserError

PAIRS = [
    ("What is the capital of France?", "The capital is Paris.", "I am 9 8 7."),
    ("Give three tips", "Eat well, sleep well, walk.", "no"),
    ("add", "return a + b", "return a - b, that is what I would do!"),
]
LORA = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def dataset(tokenizer, **settings):
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in PAIRS]
    return build_preference_dataset(
        Dataset.from_list(rows), tokenizer, max_length=128, shuffle_before_pack=False, **settings
    )


def batch(tokenizer, packed=False, **settings):
    made = dataset(tokenizer, use_varlen_attn=packed, max_packed_length=1024, **settings)
    return preference_collate_fn(list(made), use_varlen_attn=packed)["data"]


def model(kind=DPO, arch="llama", lora=False, seed=0, **settings):
    torch.manual_seed(seed)
    llm = make_model(arch)
    torch.manual_seed(1)
    return kind(llm, lora=LoraConfig(**LORA) if lora else None, **settings)


def moved(built):
    """The model with weights that are not those of the reference any more."""
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in built.parameters():
            if weight.requires_grad:
                weight.add_(0.02 * torch.randn_like(weight))
    return built


def plain_log_probs(llm, data):
    """(2 P,) sums and means by the textbook: all logits, one answer at a time."""
    sums, means = [], []
    for ids, labels, mask in zip(
        data["input_ids"], data["labels"], data["attention_mask"], strict=True
    ):
        length = int(mask.sum())
        logits = llm(input_ids=ids[None, :length]).logits[0, :-1].float()
        goal = labels[1:length]
        log_probs = log_softmax(logits, -1).gather(1, goal.clamp(min=0)[:, None])[:, 0]
        log_probs = log_probs[goal != -100]
        sums.append(log_probs.sum())
        means.append(log_probs.mean())
    return torch.stack(sums), torch.stack(means)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_dpo_equals_plain_transformers(tokenizer, packed, lora):
    built = moved(model(lora=lora))
    data = batch(tokenizer, packed)
    loss = built(data)["loss"]
    loss.backward()
    found = {n: w.grad.clone() for n, w in built.named_parameters() if w.grad is not None}
    built.zero_grad()
    padded = batch(tokenizer)
    with torch.no_grad():
        if lora:
            with built.llm.disable_adapter():
                reference, _ = plain_log_probs(built.llm, padded)
        else:
            reference, _ = plain_log_probs(built.ref_llm, padded)
    ratios = plain_log_probs(built.llm, padded)[0] - reference
    expected = -logsigmoid(0.1 * (ratios[::2] - ratios[1::2])).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert found
    for name, weight in built.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(found[name], weight.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("loss_type", list(preference_losses.DPO_LOSSES))
def test_at_the_start_policy_and_reference_agree(tokenizer, loss_type):
    data = batch(tokenizer)
    full, adapter = (model(lora=lora, loss_type=loss_type)(data) for lora in (False, True))
    for key in full:
        torch.testing.assert_close(full[key], adapter[key], rtol=1e-4, atol=1e-5)
    assert full["reward_margin"].abs() < 1e-5


@pytest.mark.parametrize("packed", [False, True])
def test_precomputed_equals_live(tokenizer, packed):
    made = dataset(tokenizer, use_varlen_attn=packed, max_packed_length=1024)
    data = preference_collate_fn(list(made), use_varlen_attn=packed)["data"]
    live, ahead = model(), model(precompute_reference=True)
    assert ahead.ref_llm is None
    values = ahead(data, mode="reference").tolist()
    ahead.llm.load_state_dict(moved(live).llm.state_dict())
    with pytest.raises(RuntimeError, match="the batch has no ref_chosen_logps"):
        ahead(data)  # never with the trained model in place of the reference
    if packed:
        columns = [{"ref_chosen_logps": values[::2], "ref_rejected_logps": values[1::2]}]
    else:
        pairs = zip(values[::2], values[1::2], strict=True)
        columns = [{"ref_chosen_logps": a, "ref_rejected_logps": b} for a, b in pairs]
    rows = [{**row, **added} for row, added in zip(made, columns, strict=True)]
    found = ahead(preference_collate_fn(rows, use_varlen_attn=packed)["data"])
    for key, value in live(data).items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)


def with_dropout(p=0.5, **settings):
    """A model with an adapter that does something, and dropout in front of it."""
    torch.manual_seed(0)
    llm = make_model("llama")
    torch.manual_seed(1)
    return moved(DPO(llm, lora=LoraConfig(**LORA, lora_dropout=p), **settings))


def test_the_reference_has_no_dropout(tokenizer):
    data = batch(tokenizer)
    built = with_dropout().train()
    one, other = built.reference_logps(data), built.reference_logps(data)
    assert torch.equal(one, other)
    assert built.training and built.llm.training
    policy, again = built.completion_logps(data), built.completion_logps(data)
    assert not torch.equal(policy.log_probs, again.log_probs)


def test_a_frozen_adapter_that_is_the_reference_has_no_dropout(tokenizer):
    data = batch(tokenizer)
    built = with_dropout()
    built.keep_initial_adapter()
    expected = built.eval().completion_logps(data).log_probs.detach()
    moved(built.train())
    assert torch.equal(built.reference_logps(data), expected)
    assert torch.equal(built.reference_logps(data), expected)


def test_a_frozen_reference_does_not_follow_train():
    built = model().train()
    assert built.llm.training
    assert not any(module.training for module in built.ref_llm.modules())


def test_a_frozen_adapter_is_neither_trained_nor_saved(tokenizer, tmp_path):
    built = with_dropout(p=0.0)
    before = set(built.state_dict())
    built.keep_initial_adapter()
    data = batch(tokenizer)
    built(data)["loss"].backward()
    trained = [name for name, weight in built.named_parameters() if weight.grad is not None]
    assert trained and not any("reference" in name for name in trained)
    assert set(built.state_dict()) == before
    built.to_hf(tmp_path / "hf")
    assert sorted(file.name for file in (tmp_path / "hf").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize("init", [True, "gaussian", "pissa"])
def test_the_reference_is_the_model_before_training(tokenizer, init):
    """PiSSA moves a part of the base into the adapter: without it the base is another model."""
    data = batch(tokenizer)
    torch.manual_seed(0)
    expected, _ = plain_log_probs(make_model("llama"), data)
    torch.manual_seed(0)
    built = DPO(make_model("llama"), lora=LoraConfig(**LORA, init_lora_weights=init))
    for policy in (built, moved(built)):
        torch.testing.assert_close(policy.reference_logps(data), expected, rtol=1e-4, atol=1e-3)
    assert abs(float(built(data)["reward_margin"])) > 1e-3


def test_kto_pair_has_no_gradient_through_its_kl():
    """Against finite differences of the loss with the KL held."""
    ratios = torch.tensor([0.7, 0.4, -0.2, 0.9], dtype=torch.float64, requires_grad=True)

    def loss(values, kl):
        chosen, rejected = values[::2], values[1::2]
        liked = 1 - torch.sigmoid(0.5 * (chosen - kl[1]))
        disliked = 1 - torch.sigmoid(0.5 * (kl[0] - rejected))
        return ((liked + disliked) / 2).sum()

    pairs = preference_losses.Ratios(ratios[::2], ratios[1::2])
    preference_losses.kto_pair(pairs, 0.5, 0.0).sum().backward()
    kl = [ratios[::2].detach().mean().clamp(min=0), ratios[1::2].detach().mean().clamp(min=0)]
    assert all(float(each) > 0 for each in kl)
    for place in range(4):
        step = torch.zeros(4, dtype=torch.float64)
        step[place] = 1e-6
        slope = (loss(ratios.detach() + step, kl) - loss(ratios.detach() - step, kl)) / 2e-6
        assert float(ratios.grad[place]) == pytest.approx(float(slope), rel=1e-5)


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


def test_a_reference_is_not_saved(tokenizer):
    built = model()
    assert built.ref_llm is not None
    assert all(name.startswith("llm.") for name in built.state_dict())
    assert not any(weight.requires_grad for weight in built.ref_llm.parameters())


def test_a_token_with_id_0_counts():
    built = model()
    ids = torch.tensor([[5, 6, 0, 7], [5, 6, 8, 9]])
    labels = torch.tensor([[-100, -100, 0, 7], [-100, -100, 8, 9]])
    data = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    logps = built.completion_logps(data)
    assert logps.tokens.tolist() == [2, 2]
    torch.testing.assert_close(logps.log_probs, plain_log_probs(built.llm, data)[0])


@pytest.mark.parametrize("packed", [False, True])
def test_orpo_equals_plain_transformers(tokenizer, packed):
    built = model(ORPO, beta=0.2)
    data, padded = batch(tokenizer, packed), batch(tokenizer)
    found = built(data)
    _, means = plain_log_probs(built.llm, padded)
    chosen, rejected = means[::2], means[1::2]
    odds = (chosen - rejected) - (
        torch.log1p(-torch.exp(chosen)) - torch.log1p(-torch.exp(rejected))
    )
    labels = padded["labels"][::2]
    logits = built.llm(
        input_ids=padded["input_ids"][::2], attention_mask=padded["attention_mask"][::2]
    ).logits
    likelihood = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected = likelihood - 0.2 * logsigmoid(odds).mean()
    torch.testing.assert_close(found["loss"], expected, rtol=1e-4, atol=1e-5)
    assert built.num_items(data) == {"pairs": 3, "tokens": int((labels[:, 1:] != -100).sum())}


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


def train(built, data, steps=25, lr=5e-3):
    optimizer = torch.optim.AdamW([w for w in built.parameters() if w.requires_grad], lr=lr)
    first = last = None
    for _ in range(steps):
        found = built(data)
        first, last = first or found, found
        optimizer.zero_grad()
        found["loss"].backward()
        optimizer.step()
    return first, last


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(DPO, dict(loss_type=name)) for name in preference_losses.DPO_LOSSES]
    + [(ORPO, dict(beta=1.0))],
)
def test_training_prefers_the_chosen_answers(tokenizer, kind, settings):
    built = model(kind, lora=True, **settings)
    _, last = train(built, batch(tokenizer), steps=40)
    assert last["reward_acc"] == 1
    assert last["reward_margin"] > 0


@pytest.mark.parametrize("loss_type", ["ranking", "focal"])
@pytest.mark.parametrize("penalty", ["log_barrier", "L2", "none"])
def test_reward_models_learn(tokenizer, loss_type, penalty):
    built = model(RewardModel, lora=True, loss_type=loss_type, penalty_type=penalty)
    data = batch(tokenizer, is_dpo=False, is_reward=True, reward_token_id=2)
    _, last = train(built, data)
    assert last["reward_acc"] == 1


def test_wrong_settings_are_named():
    with pytest.raises(UserError, match="sigmoyd"):
        model(loss_type="sigmoyd")
    with pytest.raises(UserError, match="label smoothing"):
        model(loss_type="ipo", label_smoothing=0.1)
    with pytest.raises(UserError, match="penalty_type 'l3'"):
        model(RewardModel, penalty_type="l3")


def test_losses_by_hand():
    ratios = preference_losses.Ratios(torch.tensor([1.0]), torch.tensor([-0.5]))
    margin = 0.5 * 1.5
    s = 1 / (1 + math.exp(-margin))
    expected = {
        "sigmoid": -0.9 * math.log(s) - 0.1 * math.log(1 - s),
        "robust": (-0.9 * math.log(s) + 0.1 * math.log(1 - s)) / 0.8,
        "hinge": 1 - margin,
        "ipo": (1.5 - 1.0) ** 2,
        "kto_pair": (
            1 - 1 / (1 + math.exp(-0.5 * (1 - 0))) + 1 - 1 / (1 + math.exp(-0.5 * (1 + 0.5)))
        )
        / 2,
        "sppo_hard": (1 - 1.0) ** 2 + (-0.5 + 1.0) ** 2,
        "nca_pair": math.log(1 + math.exp(-0.5))
        + 0.5 * math.log(1 + math.exp(0.5))
        + 0.5 * math.log(1 + math.exp(-0.25)),
    }
    for name, value in expected.items():
        smoothing = 0.1 if name in ("sigmoid", "robust") else 0.0
        found = preference_losses.DPO_LOSSES[name](ratios, 0.5, smoothing)
        assert found.item() == pytest.approx(value, rel=1e-5), name


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
