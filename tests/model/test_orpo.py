"""ORPO: equal to plain transformers, packed or not."""

import pytest
import torch
from torch.nn.functional import cross_entropy, logsigmoid

from tests.helpers.preference import batch, model, plain_log_probs
from tests.helpers.tiny import make_tokenizer
from xtuner.model.orpo import ORPO


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


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
