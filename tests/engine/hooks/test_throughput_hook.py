"""Tokens and FLOPs per second."""

from __future__ import annotations

import pytest
import torch

from tests.engine.toy import run_with
from tests.helpers.tiny import make_model
from xtuner.engine.hooks import (
    ThroughputHook,
    VarlenAttnArgsToMessageHubHook,
)
from xtuner.engine.hooks.throughput_hook import attended, cost_of_a_token


def test_throughput_is_logged(tmp_path):
    runner = run_with(tmp_path, ThroughputHook(peak_tflops=0.001), VarlenAttnArgsToMessageHubHook())
    hub = runner.message_hub
    assert hub.get_scalar("train/tokens_per_sec").current() > 0
    tflops = hub.get_scalar("train/tflops").current()
    assert hub.get_scalar("train/mfu").current() == pytest.approx(tflops / 0.001)


def test_the_cost_of_a_token():
    model = make_model("llama")
    matrices = sum(
        p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n
    )
    per_token, per_pair = cost_of_a_token(model)
    assert per_token == 6 * matrices
    assert per_pair == 2 * 64 * 2 * 3
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert cost_of_a_token(model)[0] == 4 * matrices


def test_attention_is_counted_within_samples():
    cu_seqlens = [torch.tensor([0, 3, 10], dtype=torch.int32)]
    ids = torch.zeros(1, 10, dtype=torch.long)
    assert attended({"input_ids": ids, "cumulative_len": cu_seqlens}) == 9 + 49
    assert attended({"input_ids": ids}) == 100
