"""Losses of preference learning: functions of log-probabilities or rewards, a value for each pair.

A loss of DPO takes ``Ratios`` (P pairs) and ``beta`` and gives (P,). A new one is a function here
and its name in ``DPO_LOSSES``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

REWARD_BOUND = 5.0
"""Rewards are kept between minus and plus this by the log-barrier penalty."""
BARRIER_EDGE = 1e-3
"""Nearer than this to a bound the barrier continues as a straight line."""


@dataclass(frozen=True)
class Ratios:
    """log pi(y|x) - log pi_ref(y|x) of the chosen and the rejected answers, (P,) each."""

    chosen: Tensor
    rejected: Tensor

    @property
    def margin(self) -> Tensor:
        return self.chosen - self.rejected


DPOLoss = Callable[[Ratios, float, float], Tensor]


def sigmoid(ratios: Ratios, beta: float, label_smoothing: float) -> Tensor:
    """DPO (Rafailov et al. 2023, eq. 7); with label smoothing conservative DPO (Mitchell 2023)."""
    margin = beta * ratios.margin
    right, wrong = logsigmoid(margin), logsigmoid(-margin)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def robust(ratios: Ratios, beta: float, label_smoothing: float) -> Tensor:
    """Provably robust DPO (Chowdhury et al. 2024): unbiased where labels are flipped at a rate."""
    margin = beta * ratios.margin
    right, wrong = logsigmoid(margin), logsigmoid(-margin)
    return ((label_smoothing - 1) * right + label_smoothing * wrong) / (1 - 2 * label_smoothing)


def hinge(ratios: Ratios, beta: float, label_smoothing: float) -> Tensor:
    """The hinge loss of SLiC (Zhao et al. 2023) on DPO's margin."""
    return relu(1 - beta * ratios.margin)


def ipo(ratios: Ratios, beta: float, label_smoothing: float) -> Tensor:
    """IPO (Azar et al. 2023, eq. 17); its ratios are means over the tokens of an answer."""
    return (ratios.margin - 1 / (2 * beta)) ** 2


def kto_pair(ratios: Ratios, beta: float, label_smoothing: float) -> Tensor:
    """KTO (Ethayarajh et al. 2024) for pairs; the KL is the micro-batch's, without gradient."""
    kl_chosen = ratios.chosen.detach().mean().clamp(min=0)
    kl_rejected = ratios.rejected.detach().mean().clamp(min=0)
    liked = 1 - torch.sigmoid(beta * (ratios.chosen - kl_rejected))
    disliked = 1 - torch.sigmoid(beta * (kl_chosen - ratios.rejected))
    return (liked + disliked) / 2


def sppo_hard(ratios: Ratios, beta: float, label_smoothing: float) -> Tensor:
    """SPPO (Wu et al. 2024, eq. 4.7) with a win probability of 1 for the chosen answer."""
    return (ratios.chosen - 0.5 / beta) ** 2 + (ratios.rejected + 0.5 / beta) ** 2


def nca_pair(ratios: Ratios, beta: float, label_smoothing: float) -> Tensor:
    """NCA (Chen et al. 2024) for pairs: the reward of the chosen answer must not fall."""
    chosen, rejected = beta * ratios.chosen, beta * ratios.rejected
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


DPO_LOSSES: dict[str, DPOLoss] = {
    loss.__name__: loss for loss in (sigmoid, robust, hinge, ipo, kto_pair, sppo_hard, nca_pair)
}
MEAN_OVER_TOKENS = frozenset({"ipo"})
"""Losses whose log-probabilities are means over the tokens of an answer, not sums."""


def log_odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """log sigmoid of the log odds ratio of two answers: ORPO (Hong et al. 2024, eq. 7).

    Args:
        chosen: (P,) mean log-probabilities of the tokens of the chosen answers.
        rejected: (P,) likewise.
    """
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return logsigmoid(log_odds)


def _log1mexp(values: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, precise near 0 as well."""
    values = values.clamp(max=-1e-7)
    return torch.where(
        values > -0.6931, torch.log(-torch.expm1(values)), torch.log1p(-values.exp())
    )


def ranking(chosen: Tensor, rejected: Tensor) -> Tensor:
    """The ranking loss of reward models (Ouyang et al. 2022, eq. 1), (P,)."""
    return -logsigmoid(chosen - rejected)


def focal(chosen: Tensor, rejected: Tensor) -> Tensor:
    """The focal ranking loss of InternLM2 (2024, section 4.2), (P,): easy pairs count less."""
    easy = 2 * relu(torch.sigmoid(chosen - rejected) - 0.5)
    return -((1 - easy) ** 2) * logsigmoid(chosen - rejected)


REWARD_LOSSES = {"ranking": ranking, "focal": focal}


def log_barrier(rewards: Tensor) -> Tensor:
    """A wall at ±5 around rewards (InternLM2 2024, section 4.2), elementwise."""
    return -_log_barrier_term(REWARD_BOUND - rewards) - _log_barrier_term(rewards + REWARD_BOUND)


def _log_barrier_term(distance: Tensor) -> Tensor:
    """log, and its tangent where the distance is hardly positive: the way back has a slope."""
    near = distance.clamp(min=BARRIER_EDGE)
    return near.log() + (distance - near) / BARRIER_EDGE


def l2(rewards: Tensor) -> Tensor:
    """Squared rewards, elementwise."""
    return rewards**2


PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {
    "log_barrier": log_barrier,
    "L2": l2,
    "none": torch.zeros_like,
}
