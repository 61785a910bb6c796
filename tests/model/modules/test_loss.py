"""Labels are shifted within samples, and log-probabilities equal the plain ones."""

import torch
from torch import nn

from xtuner.model.modules import loss as loss_module
from xtuner.model.modules.loss import (
    shift_labels,
    token_log_probs,
)

IGNORED = -100


def test_token_log_probs_equal_the_plain_ones(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 97 * 20)  # several chunks
    torch.manual_seed(0)
    head = nn.Linear(24, 97, bias=False)
    hidden, targets = torch.randn(45, 24), torch.randint(0, 97, (45,))
    expected = head(hidden).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(token_log_probs(hidden, head, targets), expected)


def test_shift_never_crosses_a_boundary():
    labels = torch.tensor([[1, 2, 3, 4, 5, 6]])
    assert shift_labels(labels).tolist() == [[2, 3, 4, 5, 6, IGNORED]]
    cu_seqlens = torch.tensor([0, 2, 6])
    assert shift_labels(labels, cu_seqlens).tolist() == [[2, IGNORED, 4, 5, 6, IGNORED]]


def test_nothing_is_predicted_from_padding():
    labels = torch.tensor([[IGNORED, IGNORED, 3, 4], [1, 2, 3, IGNORED]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    expected = [[IGNORED, IGNORED, 4, IGNORED], [2, 3, IGNORED, IGNORED]]
    assert shift_labels(labels, attention_mask=mask).tolist() == expected
