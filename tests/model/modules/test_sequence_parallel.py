"""Loss and gradients of a micro-batch whose rows two processes shard, for many architectures."""

import pytest
import torch
import torch.distributed as dist

from tests.helpers.architectures import make_architecture
from tests.helpers.tiny import make_model
from tests.model import test_llava
from tests.parallel.test_sequence import DYNAMIC, LONGROPE
from tests.parallel.workers import together
from xtuner.dataset.collate_fns import default_collate_fn
from xtuner.model import SupervisedFinetune
from xtuner.model.modules import attention
from xtuner.parallel.sequence import init_sequence_parallel

MODELS = {
    "llama": ("llama", {}),
    "five heads": (
        "llama",
        {"hidden_size": 80, "num_attention_heads": 5, "num_key_value_heads": 1},
    ),
    "one head": ("llama", {"hidden_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1}),
    "tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "windows and caps": ("gemma2", {"sliding_window": 8}),
    "two ropes": ("gemma3_text", {"sliding_window": 8}),
    "longrope": ("phi3", LONGROPE),
    "dynamic rope": ("llama", DYNAMIC),
    "experts": ("mixtral", {"num_local_experts": 4}),
    "router loss": (
        "mixtral",
        {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5},
    ),
    "latent": (
        "deepseek_v3",
        {
            "head_dim": 8,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "first_k_dense_replace": 2,
        },
    ),
}
WHOLE = ["gpt_oss", "llama4_text"]
"""With attention sinks, and with a body that cannot be called without its head."""
UNCHUNKED = {"attention_chunk_size": 64}
BATCHES = ["padded", "left", "packed", "embedded", "short"]


def batch(kind, model):
    generator = torch.Generator().manual_seed(0)
    sizes = [1] if kind == "short" else [31, 12, 20]
    rows = []
    for size in sizes:
        ids = torch.randint(10, 500, (size,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (size // 2) + ids[size // 2 :]})
    data = default_collate_fn(rows, use_varlen_attn=kind == "packed")["data"]
    if kind == "left":
        data = {name: value.flip(1) for name, value in data.items()}
        data["position_ids"] = (data["attention_mask"].cumsum(1) - 1).clamp(min=0)
    if kind == "embedded":
        data["inputs_embeds"] = model.get_input_embeddings()(data.pop("input_ids")).detach()
        del data["position_ids"]
    return data


def losses_and_gradients(size):
    """Added over the processes, for each model and batch."""
    if size > 1:
        init_sequence_parallel(size)
    found = {}
    for name, (architecture, settings) in MODELS.items():
        torch.manual_seed(0)
        llm = make_model(architecture, **settings)
        llm.set_attn_implementation(attention.register())
        model = SupervisedFinetune(llm=llm, use_activation_checkpointing=name == "llama")
        for kind in BATCHES:
            found[f"{name}, {kind}"] = added(model, batch(kind, llm))
    for architecture in WHOLE:
        llm = make_architecture(architecture, attention=attention.register(), **UNCHUNKED)
        model = SupervisedFinetune(llm=llm, use_activation_checkpointing=False)
        for kind in ("padded", "packed"):
            found[f"{architecture}, {kind}"] = added(model, batch(kind, llm))
    for packed in (False, True):
        seeing = test_llava.make(use_activation_checkpointing=False)
        seeing.llm.set_attn_implementation(attention.register())
        data = default_collate_fn(test_llava.rows(), use_varlen_attn=packed)["data"]
        found[f"images, {packed}"] = added(seeing, data)
    return found


def added(model, data):
    """Loss and gradient, added over the processes."""
    model.zero_grad()
    loss = model(data, mode="loss")["loss"]
    loss.backward()
    grads = [w.grad for w in model.parameters() if w.grad is not None]
    gradient = torch.cat([grad.flatten() for grad in grads])
    loss = loss.detach()
    if dist.is_initialized():
        dist.all_reduce(loss), dist.all_reduce(gradient)
    return [loss, gradient]


@pytest.mark.slow
def test_shared_rows_give_the_same():
    alone, shared = losses_and_gradients(1), together(losses_and_gradients, 2, 2)[0]
    assert len(alone) == len(MODELS) * len(BATCHES) + 2 * len(WHOLE) + 2
    for case, (loss, gradient) in alone.items():
        torch.testing.assert_close(shared[case][0], loss, rtol=1e-5, atol=1e-5, msg=case)
        off = (shared[case][1] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert off < 1e-4, case


def kept_for_backward(size):
    """Bytes of what a forward pass keeps besides the weights."""
    if size > 1:
        init_sequence_parallel(size)
    torch.manual_seed(0)
    llm = make_model("llama", max_position_embeddings=1024)
    llm.set_attn_implementation(attention.register())
    model = SupervisedFinetune(llm=llm, use_activation_checkpointing=False)
    ids = torch.randint(10, 500, (1, 1024))
    data = default_collate_fn([{"input_ids": ids[0].tolist(), "labels": ids[0].tolist()}])["data"]
    model.shard(data), model.can_skip_logits(data)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(data, mode="loss")["loss"]
    assert loss.requires_grad
    return sum(kept.values())


def test_a_rank_keeps_its_part_of_the_activations():
    alone = kept_for_backward(1)
    for size in (2, 4):
        assert max(together(kept_for_backward, size, size)) < 1.2 * alone / size
