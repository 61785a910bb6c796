"""Scaling of rotary embeddings by the length is that of each sample, packed and padded."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.tiny import make_model
from xtuner.dataset.collate_fns import default_collate_fn
from xtuner.model import SupervisedFinetune
from xtuner.model.modules import attention
from xtuner.model.modules.packed_rotary import split_rotary

TRAINED, LENGTHS = 16, (11, 3, 26, 5)
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": TRAINED,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
KINDS = {
    "phi3": {
        "rope_parameters": LONGROPE,
        "original_max_position_embeddings": TRAINED,
        "max_position_embeddings": 64,
    },
    "llama": {"rope_parameters": DYNAMIC, "max_position_embeddings": TRAINED},
}


@pytest.fixture(params=KINDS)
def build(request):
    def make():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4}
        model = make_model(request.param, **sizes, head_dim=8, **KINDS[request.param])
        model.set_attn_implementation(attention.register())
        return model.eval()

    return make


def alone(build, rows):
    """Each row through a model that has seen no other."""
    return [build()(input_ids=row[None], use_cache=False).logits[0] for row in rows]


@torch.no_grad()
@pytest.mark.parametrize("layout", ["packed", "left", "right"])
def test_each_sample_is_what_it_is_alone(build, layout):
    rows = [torch.arange(3, 3 + length) * 7 % 400 for length in LENGTHS]
    places = [torch.arange(length) for length in LENGTHS]
    model = SupervisedFinetune(build(), use_varlen_attn=layout == "packed").eval()
    if layout != "left":
        samples = [{"input_ids": row, "labels": row} for row in rows]
        batch = default_collate_fn(samples, use_varlen_attn=layout == "packed")["data"]
    else:
        sides = [(max(LENGTHS) - length, 0) for length in LENGTHS]
        pad = torch.nn.functional.pad
        batch = {
            "input_ids": torch.stack([pad(r, s) for r, s in zip(rows, sides, strict=True)]),
            "position_ids": torch.stack([pad(p, s) for p, s in zip(places, sides, strict=True)]),
            "attention_mask": torch.stack(
                [pad(torch.ones_like(r), s) for r, s in zip(rows, sides, strict=True)]
            ),
        }
    split_rotary(model.causal_lm)
    logits = model(batch, mode="tensor").logits
    found = (
        logits[0].split(LENGTHS)
        if layout == "packed"
        else [row[mask == 1] for row, mask in zip(logits, batch["attention_mask"], strict=True)]
    )
    for one, other in zip(found, alone(build, rows), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_first_batch_of_a_run_does_it(build):
    model = SupervisedFinetune(build(), use_varlen_attn=True)
    ids = torch.arange(3, 12)[None]
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(9)[None]}
    before = model.causal_lm.model.rotary_emb.forward
    model(batch | {"cumulative_len": [torch.tensor([0, 9]).int()], "max_seqlen": 9})
    assert model.causal_lm.model.rotary_emb.forward != before
