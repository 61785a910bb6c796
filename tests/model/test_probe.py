"""The probe finds models that mix packed samples, see the future or attend to padding."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.helpers.architectures import VOCABULARY, make_architecture
from xtuner.dataset.collate_fns import default_collate_fn
from xtuner.model.modules import attention
from xtuner.model.modules.chunks import require_own_temperatures, require_within_chunks
from xtuner.model.probe import (
    RowProbe,
    ensure_exact_rows,
    probe_rows,
    require_exact_rows,
)
from xtuner.model.sft import SupervisedFinetune
from xtuner.utils.errors import UserError

CPU = torch.device("cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def probe(kind: str, dtype: torch.dtype, *, packed: bool, padded: bool = False) -> RowProbe:
    llm = make_architecture(kind, attention=attention.register(), dtype=dtype)
    model = SupervisedFinetune(llm, use_activation_checkpointing=False).eval()
    return probe_rows(
        lambda batch: model(batch, mode="tensor").logits,
        VOCABULARY,
        CPU,
        packed=packed,
        padded=padded,
    )


@DTYPES
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "mixtral", "qwen3_moe"])
def test_exact_models_pass(kind, dtype):
    found = probe(kind, dtype, packed=True, padded=True)
    assert found.is_exact, found
    require_exact_rows(found, kind, packed=True)


@DTYPES
@pytest.mark.parametrize("kind", ["granitemoehybrid", "lfm2", "minimax", "nemotron"])
def test_models_that_mix_packed_samples_are_refused(kind, dtype):
    found = probe(kind, dtype, packed=True)
    assert found.is_causal and not found.packs_exactly, found
    with pytest.raises(UserError, match="not computed separately by Model"):
        require_exact_rows(found, "Model", packed=True)


def test_a_model_that_sees_the_future_is_refused():
    llm = make_architecture("llama", attention="sdpa")
    for layer in llm.model.layers:
        layer.self_attn.is_causal = False

    def forward(batch):
        mask = torch.ones(1, 1, *batch["input_ids"].shape[-1:] * 2, dtype=torch.bool)
        return llm(batch["input_ids"], attention_mask=mask).logits

    with torch.no_grad():
        found = probe_rows(forward, VOCABULARY, CPU, packed=False, padded=False)
    assert not found.is_causal
    with pytest.raises(UserError, match="earlier tokens depend on later ones"):
        require_exact_rows(found, "Model", packed=False)


def test_rows_that_attend_to_padding_are_refused():
    llm = make_architecture("llama", attention="sdpa")

    def forward(batch):
        ids = batch["input_ids"].flip(1)  # padding comes first and is not masked
        return llm(ids).logits.flip(1)

    with torch.no_grad():
        found = probe_rows(forward, VOCABULARY, CPU, packed=False)
    assert not found.pads_exactly
    with pytest.raises(UserError, match="padded rows are not computed exactly"):
        require_exact_rows(RowProbe(future=0.0, padded=found.padded), "Model", packed=False)


def test_what_is_not_finite_is_not_exact():
    def forward(batch):
        return torch.full((*batch["input_ids"].shape, 4), torch.nan)

    assert not probe_rows(forward, VOCABULARY, CPU, packed=True).is_exact


def test_a_model_that_fails_on_a_batch_is_refused_with_what_it_said():
    def forward(batch):
        raise RuntimeError("The size of tensor a (9) must match\nmore")

    with pytest.raises(UserError, match=r"tensor a \(9\)") as caught:
        probe_rows(forward, VOCABULARY, CPU, packed=True)
    assert "more" not in str(caught.value)


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "lfm2", "bloom", "xglm", "codegen"])
@pytest.mark.parametrize("implementation", ["xtuner", "eager"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_a_first_batch_is_exact_or_refused(kind, implementation, packed):
    name = attention.register() if implementation == "xtuner" else implementation
    llm = make_architecture(kind, attention=name)
    model = SupervisedFinetune(llm, use_activation_checkpointing=False, use_varlen_attn=packed)
    model.eval()
    rows = [torch.arange(100, 107), torch.arange(200, 205)]
    collate = partial(default_collate_fn, use_varlen_attn=packed)
    instances = [{"input_ids": row, "labels": row} for row in rows]
    total = {"tokens": sum(len(row) - 1 for row in rows)}
    try:
        loss = model(**collate(instances), num_items_in_batch=total)["loss"]
    except UserError:
        assert kind in ("bloom", "xglm", "codegen")
        return
    plain = make_architecture(kind, attention="eager").eval()
    wanted = sum(
        plain(input_ids=row[None], labels=row[None]).loss * (len(row) - 1) / total["tokens"]
        for row in rows
    )
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)


@pytest.mark.parametrize("implementation", ["eager", attention.register()])
def test_samples_longer_than_a_chunk_are_refused_where_they_would_be_wrong(implementation):
    llm = make_architecture("llama4_text", attention=implementation)
    require_within_chunks(llm, 4)
    if implementation == "eager":
        require_within_chunks(llm, 5)
        return
    with pytest.raises(UserError, match="chunks of 4 tokens, and a sample has 5") as refused:
        require_within_chunks(llm, 5)
    assert "max_length to 4" in refused.value.hint


def test_long_packed_rows_are_refused_where_positions_are_those_of_the_row():
    changes = {"floor_scale": 8, "no_rope_layers": [1, 0]}
    llm = make_architecture("llama4_text", attention="eager", **changes).eval()
    ids = torch.arange(100, 108)[None]
    own = {"position_ids": torch.arange(8)[None]}
    with torch.no_grad():  # of the last token alone the temperature is another one
        short = llm(input_ids=ids, **own).logits[:, :7]
        llm.config.attn_temperature_tuning = False
        for layer in llm.model.layers:
            layer.self_attn.attn_temperature_tuning = False
        assert torch.equal(llm(input_ids=ids, **own).logits[:, :7], short)
        require_own_temperatures(llm, 9)
    llm.config.attn_temperature_tuning = True
    require_own_temperatures(llm, 8)
    with pytest.raises(UserError, match="from 8 tokens on, and a packed or shared row has 9"):
        require_own_temperatures(llm, 9)
    model = SupervisedFinetune(llm, use_activation_checkpointing=False, use_varlen_attn=True)
    rows = [{"input_ids": row, "labels": row} for row in (ids[0, :5], ids[0, 4:])]
    batch = default_collate_fn(rows, use_varlen_attn=True)["data"]
    with pytest.raises(UserError, match="positions in the row"):
        model.eval()(batch, mode="loss")


def test_training_refuses_a_sample_longer_than_a_chunk():
    llm = make_architecture("llama4_text", attention=attention.register())
    model = SupervisedFinetune(llm, use_activation_checkpointing=False)
    ids = torch.arange(10, 19)[None]
    with pytest.raises(UserError, match="chunks of 4 tokens"):
        model({"input_ids": ids, "labels": ids})
    short = ids[:, :4]
    assert torch.isfinite(model({"input_ids": short, "labels": short})["loss"])


class Leaking(torch.autograd.Function):
    """The identity, whose gradient goes to the token before, too."""

    @staticmethod
    def forward(ctx, hidden):
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, gradient):
        return gradient + 0.1 * gradient.roll(-1, dims=1)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("fault", [True, False], ids=["leaks", "exact"])
def test_outputs_that_agree_do_not_hide_a_gradient_that_leaks(packed, fault, caplog):
    llm = make_architecture("qwen3", attention=attention.register()).eval()
    model = SupervisedFinetune(llm, use_activation_checkpointing=False).eval()
    if fault:
        llm.model.layers[0].mlp.register_forward_hook(lambda *call: Leaking.apply(call[-1]))

    def ensure():
        ensure_exact_rows(llm, model.hidden_states, packed=packed, padded=not packed)
        assert not any(weight.grad is not None for weight in llm.parameters())

    if not fault:
        ensure()
    elif packed:
        ensure()
        assert "one by one" in caplog.text
        assert "do not train separately in Qwen3ForCausalLM" in caplog.text
    else:
        with pytest.raises(UserError, match="padded rows do not train exactly"):
            ensure()


def test_positions_begin_where_the_model_begins_them():
    llm = make_architecture("camembert", attention=attention.register(), is_decoder=True)
    plain = make_architecture("camembert", attention="eager", is_decoder=True).eval()
    model = SupervisedFinetune(llm, use_activation_checkpointing=False, use_varlen_attn=True)
    rows = [torch.arange(100, 107), torch.arange(200, 205)]
    instances = [{"input_ids": row, "labels": row} for row in rows]
    total = {"tokens": sum(len(row) - 1 for row in rows)}
    batch = default_collate_fn(instances, use_varlen_attn=True)["data"]
    loss = float(model.eval()(batch, num_items_in_batch=total)["loss"].detach())
    with torch.no_grad():
        alone = sum(
            float(plain(input_ids=row[None], labels=row[None]).loss) * (len(row) - 1)
            for row in rows
        )
    assert loss == pytest.approx(alone / total["tokens"], rel=1e-5)


def test_a_model_that_needs_masks_takes_its_own_attention():
    llm = make_architecture("deepseek_v32", attention=attention.register())  # its indexer masks
    model = SupervisedFinetune(llm, use_activation_checkpointing=False).eval()
    ensure_exact_rows(llm, model.hidden_states, packed=True, padded=False)
    assert llm.config._attn_implementation == "eager"


def test_weights_that_are_not_finite_are_named():
    llm = make_architecture("llama", attention=attention.register())
    model = SupervisedFinetune(llm, use_activation_checkpointing=False)
    with torch.no_grad():
        model.llm.model.norm.weight[0] = float("nan")
    model.eval()
    with pytest.raises(UserError, match="computes numbers that are not finite"), torch.no_grad():
        ensure_exact_rows(
            model.llm, lambda batch: model(batch, mode="tensor").logits, packed=True, padded=False
        )
