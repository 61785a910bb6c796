"""Masks by which tokens see later ones: recognized, and evaluated sample by sample."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig
from transformers.masking_utils import (
    create_causal_mask,
    create_sliding_window_causal_mask,
    sdpa_mask,
)

from xtuner.model.modules.attention import attention, register
from xtuner.model.modules.index_mask import IndexMask, lets_see_later_tokens

LENGTHS = (4, 5, 3)
BLOCKS = torch.tensor([[-1, 0, 0, -1, 1, 1, 1, -1, -1, -1, -1, -1]])
"""An image in the first sample, one in the second, none in the third."""


def mask_of(make=create_causal_mask, mask=None, name=None, **settings):
    config = LlamaConfig(sliding_window=2)
    config._attn_implementation = name or register()
    rows = 1 if mask is None else len(mask)
    embeddings = torch.zeros(rows, BLOCKS.shape[1], 1)
    if mask is None:
        mask = torch.ones(1, BLOCKS.shape[1], dtype=torch.long)
    return make(config, embeddings, mask, None, **settings)


def rows(count):
    torch.manual_seed(0)
    return [torch.randn(count, heads, BLOCKS.shape[1], 8) for heads in (4, 2, 2)]


def test_a_causal_mask_is_none():
    assert mask_of() is None
    assert mask_of(create_sliding_window_causal_mask) is None
    assert isinstance(mask_of(block_sequence_ids=BLOCKS), IndexMask)
    assert isinstance(mask_of(or_mask_function=lambda *indices: torch.tensor(True)), IndexMask)


def test_unions_inside_other_functions_are_found():
    from transformers.masking_utils import and_masks, causal_mask_function, or_masks

    union = or_masks(causal_mask_function, causal_mask_function)
    assert lets_see_later_tokens(union)
    assert lets_see_later_tokens(and_masks(causal_mask_function, union))
    assert not lets_see_later_tokens(and_masks(causal_mask_function, causal_mask_function))


@pytest.mark.parametrize("make", [create_causal_mask, create_sliding_window_causal_mask])
def test_samples_of_a_packed_row(make):
    """As torch's attention on each sample by transformers' own mask."""
    query, key, value = rows(1)
    cu_seqlens = torch.tensor([0, 4, 9, 12], dtype=torch.int32)
    mask = mask_of(make, block_sequence_ids=BLOCKS)
    window = 2 if make is create_sliding_window_causal_mask else None
    found, _ = attention(
        nn.Module(), query, key, value, mask, cu_seq_lens_q=cu_seqlens, sliding_window=window
    )
    assert mask.of_samples([9, 3], window)[1] is None  # text alone takes the fast path
    start = 0
    for length in LENGTHS:
        sample = slice(start, start + length)
        start += length
        own = sdpa_mask(1, 12, 12, mask_function=mask.function, allow_is_causal_skip=False)
        own = own[:, :, sample, sample]
        wanted = scaled_dot_product_attention(
            *(tensor[:, :, sample] for tensor in (query, key, value)), own, enable_gqa=True
        )
        torch.testing.assert_close(found[:, sample].transpose(1, 2), wanted)


def test_rows_with_padding():
    query, key, value = rows(2)
    tokens = torch.ones(2, 12, dtype=torch.long)
    tokens[0, 9:] = 0
    blocks = BLOCKS.expand(2, -1)
    found, _ = attention(
        nn.Module(), query, key, value, mask_of(mask=tokens, block_sequence_ids=blocks)
    )
    theirs = mask_of(mask=tokens, block_sequence_ids=blocks, name="sdpa")
    wanted = scaled_dot_product_attention(query, key, value, theirs, enable_gqa=True)
    torch.testing.assert_close(found[tokens.bool()], wanted.transpose(1, 2)[tokens.bool()])
    assert not mask_of(mask=tokens, block_sequence_ids=blocks).of_rows()[0, :, :, 9:].any()


def test_ranks_cannot_share_such_rows():
    query, key, value = rows(1)
    mask = mask_of(block_sequence_ids=BLOCKS)
    with pytest.raises(NotImplementedError, match="see later ones"):
        attention(nn.Module(), query, key, value, mask, sequence_group=object())
