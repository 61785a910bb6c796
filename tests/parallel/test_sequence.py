"""Sequence parallelism by its published names, and models that cannot share rows."""

import pytest
import torch
import torch.distributed as dist
from mmengine.dataset import DefaultSampler

from tests.helpers.architectures import make_config
from tests.parallel.workers import together
from xtuner import parallel
from xtuner.model import loading
from xtuner.model.modules import attention, sequence_parallel
from xtuner.parallel import sequence
from xtuner.parallel.sequence import SequenceParallelSampler, init_sequence_parallel
from xtuner.utils.errors import UserError


def test_alone_it_is_mmengines_sampler():
    ours = SequenceParallelSampler(range(10), seed=5)
    theirs = DefaultSampler(range(10), shuffle=True, seed=5)
    assert list(ours) == list(theirs)
    ours.set_epoch(2), theirs.set_epoch(2)
    assert list(ours) == list(theirs)


ORIGINAL = 24  # tokens; rows are longer, half of a row is not
LONGROPE = {
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": ORIGINAL,
        "factor": 4.0,
    },
    "original_max_position_embeddings": ORIGINAL,
}
DYNAMIC = {
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "max_position_embeddings": ORIGINAL,
}
NAMES = [
    "init_sequence_parallel",
    "init_inner_sequence_parallel",
    "init_dist",
    "get_sequence_parallel_group",
    "get_sequence_parallel_rank",
    "get_sequence_parallel_world_size",
    "get_inner_sequence_parallel_group",
    "get_inner_sequence_parallel_rank",
    "get_inner_sequence_parallel_world_size",
    "get_data_parallel_group",
    "get_data_parallel_rank",
    "get_data_parallel_world_size",
    "all_to_all",
    "split_for_sequence_parallel",
    "gather_for_sequence_parallel",
    "split_forward_gather_backward",
    "gather_forward_split_backward",
    "pad_for_sequence_parallel",
    "pad_cumulative_len_for_sequence_parallel",
    "reduce_sequence_parallel_loss",
    "sequence_parallel_wrapper",
    "pre_process_for_sequence_parallel_attn",
    "post_process_for_sequence_parallel_attn",
    "SequenceParallelSampler",
]


@pytest.mark.parametrize("name", NAMES)
def test_published_names(name):
    assert callable(getattr(sequence, name))
    assert getattr(sequence, name) is getattr(parallel, name)
    assert name in sequence.__all__


def worked(size):
    """What the published functions give on each of four ranks, two to a row."""
    init_sequence_parallel(2)
    sequence.init_inner_sequence_parallel(2)
    with pytest.raises(ValueError, match="does not divide sequence_parallel_size=2"):
        sequence.init_inner_sequence_parallel(3)
    group = sequence.get_sequence_parallel_group()
    rank = sequence.get_sequence_parallel_rank()
    found = {
        "ranks": [
            dist.get_process_group_ranks(sequence.get_sequence_parallel_group()),
            dist.get_process_group_ranks(sequence.get_data_parallel_group()),
            dist.get_process_group_ranks(sequence.get_inner_sequence_parallel_group()),
            [rank, sequence.get_inner_sequence_parallel_rank(), sequence.get_data_parallel_rank()],
        ]
    }
    whole = torch.arange(24.0).reshape(1, 4, 3, 2).requires_grad_()
    part = sequence.split_forward_gather_backward(whole, 1, group)
    back = sequence.gather_forward_split_backward(part, 1, group, "up")
    (back * torch.arange(4.0).view(1, 4, 1, 1)).sum().backward()
    found["round_trip"] = [back.detach() - whole.detach(), whole.grad]
    tokens = sequence.split_for_sequence_parallel(whole.detach(), 1, group)
    tokens = tokens.transpose(2, 3).contiguous()  # (1, 2 tokens, 2 heads, 3)
    heads = sequence.all_to_all(tokens, group)
    again = sequence.all_to_all(heads, group, scatter_dim=1, gather_dim=2)
    found["all_to_all"] = [heads - whole.detach().transpose(2, 3)[:, :, rank : rank + 1]]
    found["all_to_all"] += [again - tokens]
    found["gathered"] = [sequence.gather_for_sequence_parallel(tokens, 1, group)]
    padded = sequence.pad_for_sequence_parallel(torch.ones(1, 3), 7)
    cu_seqlens, mask = sequence.pad_cumulative_len_for_sequence_parallel([torch.tensor([0, 2, 5])])
    found["padded"] = [padded, cu_seqlens[0], mask]
    loss = torch.tensor([4.0, float("nan")][rank], requires_grad=True)
    mean = sequence.reduce_sequence_parallel_loss(loss, [3, 0][rank])
    mean.backward()
    found["loss"] = [mean.detach(), loss.grad]
    return found


def test_published_functions():
    for rank, found in enumerate(together(worked, 4, 2)):
        start, place = rank // 2 * 2, rank % 2
        assert found["ranks"] == [
            [start, start + 1],
            [place, place + 2],
            [start, start + 1],
            [place, place, rank // 2],
        ]
        off, grad = found["round_trip"]
        assert not off.any()
        assert torch.equal(grad, 2 * torch.arange(4.0).view(1, 4, 1, 1).expand_as(grad))
        assert not any(off.any() for off in found["all_to_all"])
        assert found["gathered"][0].shape == (1, 4, 2, 3)
        assert found["padded"][0].tolist() == [[1, 1, 1, 7]]
        assert found["padded"][1].tolist() == [0, 2, 5, 6]
        assert found["padded"][2].tolist() == [[True] * 5 + [False]]
        assert found["loss"][0] == 4
        assert found["loss"][1] == (2 if place == 0 else 0)  # both ranks' results depend on it


def agreements(folder):
    """Which models are let through, with two ranks to a row."""
    from transformers import AutoModelForCausalLM

    from tests.helpers.tiny import make_model

    init_sequence_parallel(2)
    rows = torch.randint(10, 500, (1, 40), generator=torch.Generator().manual_seed(0))
    said = {}
    torch.manual_seed(0)
    models = {
        "llama": make_model("llama"),
        "phi3": make_model("phi3", **LONGROPE),
        "gemma2": make_model("gemma2", sliding_window=8),
        "gemma3": make_model("gemma3_text", sliding_window=8),
        "dynamic": make_model("llama", **DYNAMIC),
        "mixtral": make_model("mixtral", num_local_experts=4),
    }
    models["gemma2"].set_attn_implementation(attention.register())  # eager by itself
    for name, model in models.items():
        said[name] = refused(model.eval(), rows)
    real = attention.to_heads
    attention.to_heads = lambda q, k, v, group: tuple(
        t.repeat(1, 1, 2, 1)[:, : t.shape[1] // 2] for t in (q, k, v)
    )
    said["broken"] = refused(models["llama"], rows)
    attention.to_heads = real
    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    said["eager"] = refused(eager, rows)
    convolutions = make_model("lfm2", layer_types=["conv", "full_attention"])
    said["convolutions"] = refused(convolutions, rows)
    attention.to_heads = broken
    said["failing"] = refused(models["llama"], rows)
    attention.to_heads = real
    said["later tokens"] = refused(sees_later_tokens(), rows)
    return said


def broken(*tensors):
    raise RuntimeError("view size is not compatible. Call .reshape().\nsecond line")


def sees_later_tokens():
    """A model whose mask may let tokens see later ones: Gemma 4 with images, on text."""
    from transformers import AutoModelForImageTextToText

    config = make_config("gemma4_unified")
    return AutoModelForImageTextToText.from_config(config, attn_implementation=attention.NAME)


def refused(model, rows):
    try:
        loading.use_shareable_attention(model)
        sequence_parallel.require_agreement(model, model.base_model, rows)
    except UserError as error:
        return str(error)
    return ""


def test_models_that_need_whole_rows_are_refused(tiny_llama):
    for said in together(agreements, 2, str(tiny_llama)):
        for name in ("llama", "phi3", "gemma2", "gemma3", "dynamic", "mixtral"):
            assert said[name] == "", name
        assert "off by" in said["broken"]
        assert "attn_implementation='eager'" in said["eager"]
        assert "(conv)" in said["convolutions"]
        assert "(view size is not compatible)" in said["failing"]
        assert "(its mask lets tokens see later ones)" in said["later tokens"]
