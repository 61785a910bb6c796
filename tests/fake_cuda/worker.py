"""Trains cases on a fake GPU: ``python -m tests.fake_cuda.worker CASES.json FOUND.json``."""

from __future__ import annotations

import copy
import dataclasses
import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
import traceback
import types
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.fake_cuda.cases import SHAPES, Case, Found
from tests.fake_cuda.tensors import (
    DEVICE,
    Recorder,
    batch_on_gpu,
    move,
    on_gpu,
    pretend,
    tensors_of,
)
from tests.helpers.image_text import FAMILIES
from tests.model import test_image_text
from xtuner.dataset.collate_fns import default_collate_fn, preference_collate_fn
from xtuner.engine.optim import FinetuneOptimWrapper
from xtuner.engine.runner import loops
from xtuner.model import DPO, RewardModel, SupervisedFinetune
from xtuner.model.backends import environment
from xtuner.model.modules import attention
from xtuner.model.modules.loss import linear_cross_entropy

GIB = 2**30


class _Broken(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a flash-attn whose library lacks a symbol."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if name == "flash_attn":
            return importlib.machinery.ModuleSpec(name, self)
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        raise ImportError("flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2E")


class _FlashAttention(torch.autograd.Function):
    """A kernel's outputs and gradients by shape."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.dtype not in (torch.float16, torch.bfloat16):
            raise RuntimeError("FlashAttention only supports fp16 and bf16 data type")
        ctx.save_for_backward(q, k, v)
        return q.new_empty(*q.shape[:-1], v.shape[-1])

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors)


def _flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> Tensor:
    """The interface of flash-attn 2, with its checks of devices and dtypes."""
    for bounds in (cu_seqlens_q, cu_seqlens_k):
        assert bounds.device == q.device and bounds.dtype is torch.int32
    assert isinstance(max_seqlen_q, int) and isinstance(max_seqlen_k, int)
    return _FlashAttention.apply(q, k, v)


def install_flash_attn(state: str) -> None:
    """Make flash-attn ``absent``, ``present`` or ``broken`` for the imports to come."""
    sys.modules.pop("flash_attn", None)
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Broken)]
    if state == "broken":
        sys.meta_path.insert(0, _Broken())
    if state == "present":
        module = types.ModuleType("flash_attn")
        module.flash_attn_varlen_func = _flash_attn_varlen_func  # type: ignore[attr-defined]
        sys.modules["flash_attn"] = module
    caches = (environment.libraries, environment.function, environment.capability)
    chosen = (attention.packed_kernel, attention._packed_choice, attention.padded_kernel)
    for cached in (*caches, *chosen, attention.dense_kernel):
        cached.cache_clear()


def build(case: Case) -> Any:
    """The model of a case, on the meta device where it is large."""
    if case.task != "sft":
        return _build_tiny(case)
    config = Qwen2Config(
        num_hidden_layers=case.layers, tie_word_embeddings=False, **SHAPES[case.shape]
    )
    dtype = torch.float32 if case.method == "full" else torch.bfloat16
    with torch.device("cpu" if case.shape == "tiny" else "meta"):
        llm = Qwen2ForCausalLM._from_config(
            config, dtype=dtype, attn_implementation=attention.register()
        )
    if case.method == "qlora":
        _quantize(llm)
    return SupervisedFinetune(
        llm,
        lora=_lora(case),
        use_activation_checkpointing={"offload": case.offload},
        use_varlen_attn=case.rows == "packed",
    )


def _build_tiny(case: Case) -> Any:
    if case.task == "llava":
        from tests.model.test_llava import make

        lora = dict(llm_lora=_lora(case)) if case.method != "full" else {}
        model = make(freeze_visual_encoder=True, **lora)
        model.llm.set_attn_implementation(attention.register())
        return model
    if case.task in FAMILIES:
        return test_image_text.make(case.task, case.rows == "packed", lora=_lora(case))
    from tests.helpers.tiny import make_model

    llm = make_model("llama")
    llm.set_attn_implementation(attention.register())
    kind = DPO if case.task == "dpo" else RewardModel
    return kind(llm, lora=_lora(case), use_varlen_attn=case.rows == "packed")


def _lora(case: Case) -> LoraConfig | None:
    if case.method == "full":
        return None
    return LoraConfig(r=case.rank, lora_dropout=case.dropout, task_type="CAUSAL_LM")


def _quantize(llm: nn.Module) -> None:
    """Put the linear layers but the head into 4 bits, with the shapes that bitsandbytes gives."""
    import bitsandbytes as bnb

    small = bnb.nn.Params4bit(
        torch.randn(64, 64, dtype=torch.bfloat16), quant_type="nf4", compress_statistics=True
    ).to("cpu")
    for name, layer in list(llm.named_modules()):
        if not isinstance(layer, nn.Linear) or layer is llm.get_output_embeddings():
            continue
        quantized = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
            device="meta",
        )
        quantized.bias = layer.bias
        quantized._parameters["weight"] = _weight_4bit(layer.weight, small.quant_state)
        parent, _, own = name.rpartition(".")
        setattr(llm.get_submodule(parent), own, quantized)
    llm.is_loaded_in_4bit = True


def _weight_4bit(weight: Tensor, like: Any) -> nn.Parameter:
    """A parameter (I * O / 2, 1) of bytes with a state that has a scale for every 64 weights."""
    state = copy.copy(like)
    state.shape, state.dtype = weight.shape, torch.bfloat16
    blocks = weight.numel() // 64
    state.absmax = torch.empty(blocks, dtype=torch.uint8, device="meta")
    state.state2 = copy.copy(like.state2)
    state.state2.absmax = torch.empty(-(-blocks // 256), device="meta")
    packed = nn.Parameter(
        torch.empty(weight.numel() // 2, 1, dtype=torch.uint8, device="meta"), requires_grad=False
    )
    attributes = dict(quant_state=state, bnb_quantized=True, compress_statistics=True)
    attributes |= dict(quant_type="nf4", quant_storage=torch.uint8, blocksize=64)
    for name, value in attributes.items():
        setattr(packed, name, value)
    return packed


def batch_of(case: Case) -> dict[str, Any]:
    """A micro-batch on the CPU."""
    packed = case.rows == "packed"
    if case.task in ("dpo", "reward"):
        from tests.helpers.preference import dataset
        from tests.helpers.tiny import make_tokenizer

        settings = (
            dict(is_dpo=False, is_reward=True, reward_token_id=2) if case.task == "reward" else {}
        )
        rows = dataset(make_tokenizer(), use_varlen_attn=packed, max_packed_length=1024, **settings)
        return preference_collate_fn(list(rows), use_varlen_attn=packed)
    if case.task == "llava":
        from tests.model.test_llava import rows as llava_rows

        return default_collate_fn(llava_rows(), use_varlen_attn=packed)
    if case.task in FAMILIES:
        return {"data": test_image_text.batch(case.task, packed=packed)}
    lengths = [case.tokens // 4] * 4 if packed else [case.tokens // 4 - 3 * n for n in range(4)]
    rows = [{"input_ids": [2] * length, "labels": [2] * length} for length in lengths]
    return default_collate_fn(rows, use_varlen_attn=packed)


def train(case: Case) -> Found:
    """Two steps; the second one's facts, as the first allocates the optimizer's state."""
    pretend(case.capability)
    install_flash_attn(case.flash_attn)
    model = build(case)
    model.train()
    # what a probe finds depends on values
    model.probed_rows, model.unpads = frozenset({"packed", "padded", "single", "images"}), True
    batch = batch_of(case)
    total = model.num_items(batch["data"])
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    recorder = Recorder(mode)
    move(mode, model)
    for tensor in tensors_of(model):
        recorder.hold(tensor)
    weights = recorder.live
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    wrapper = _optimizer(case, trained)
    for _ in range(2):
        data = {**batch, "data": model.prepare_batch(batch["data"], DEVICE)}
        there = batch_on_gpu(mode, data)
        recorder.clear()
        with mode, recorder:
            with wrapper.optim_context(model):
                outputs = model(**there, mode="loss", num_items_in_batch=total)
            wrapper.backward(outputs["loss"])
            shares = [{name: value.detach().float() for name, value in outputs.items()}]
            del outputs
            loops._read(shares, wrapper.clip())
            wrapper.step()
            wrapper.zero_grad()
    again = _optimizer(case, trained)
    with mode:
        again.load_state_dict(wrapper.state_dict())
        states = Counter(map(_place, _states(again)))
    report = {concept: name for concept, name, _ in model.backends_report(wrapper.dtype)}
    return Found(
        attention=report["attention"],
        waits=dict(recorder.waits),
        launches=sum(recorder.kernels.values()),
        gigabytes=recorder.bytes / 1e9,
        peak_gib=recorder.peak / GIB,
        weights_gib=weights / GIB,
        states=dict(states),
    )


def _optimizer(case: Case, trained: Sequence[nn.Parameter]) -> FinetuneOptimWrapper:
    if case.optimizer == "AdamW":
        optimizer: Any = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    else:
        import bitsandbytes as bnb

        bnb.functional.get_paged = _paged
        for name in ("fill", "prefetch_tensor"):  # by ctypes, on the address of a tensor
            setattr(bnb.functional, name, lambda *_, **__: None)
        # fake tensors have no address, which their own copy asks for
        bnb.optim.optimizer.deepcopy = lambda state: tree_map_only(Tensor, torch.clone, state)
        optimizer = getattr(bnb.optim, case.optimizer)(trained, lr=1e-4)
    wrapper = FinetuneOptimWrapper(
        optimizer,
        dtype="bfloat16" if case.capability >= (8, 0) else "float16",
        clip_grad=dict(max_norm=1.0),
        loss_scale=2.0**10,
    )
    wrapper.device = "cuda"
    return wrapper


def _paged(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that is shared by the GPU and the CPU, as bitsandbytes marks it."""
    found: Any = torch.zeros(shape, dtype=dtype)
    found.is_paged, found.page_deviceid = True, device.index
    return found


def _states(wrapper: FinetuneOptimWrapper) -> Iterator[Tensor]:
    for values in wrapper.optimizer.state.values():
        yield from (value for value in values.values() if isinstance(value, Tensor))


def _place(value: Tensor) -> str:
    if getattr(value, "is_paged", False):
        return "paged"
    return "gpu" if value.device.type == "cuda" else "main memory"


def loss(case: Case) -> Found:
    """The loss of ``tokens`` hidden states alone, forward and backward; the head is frozen."""
    pretend(case.capability)
    sizes = SHAPES[case.shape]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    recorder = Recorder(mode)
    head = nn.Linear(
        sizes["hidden_size"], sizes["vocab_size"], bias=False, device="meta", dtype=torch.bfloat16
    ).requires_grad_(False)
    move(mode, head)
    like = torch.empty(case.tokens, sizes["hidden_size"], dtype=torch.bfloat16, device="meta")
    hidden = on_gpu(mode, like).requires_grad_()
    targets = on_gpu(mode, torch.empty(case.tokens, dtype=torch.long, device="meta"))
    for tensor in (head.weight, hidden, targets):
        recorder.hold(tensor)
    weights = recorder.live
    with mode, recorder, torch.autocast("cuda", torch.bfloat16):
        linear_cross_entropy(hidden, head, targets).backward()
    return Found(
        waits=dict(recorder.waits),
        launches=sum(recorder.kernels.values()),
        gigabytes=recorder.bytes / 1e9,
        peak_gib=(recorder.peak - weights) / GIB,
        weights_gib=weights / GIB,
    )


def main() -> None:
    """Read the cases, write what was found, in their order."""
    attention.try_packed_kernel = lambda *_, **__: None  # nothing can be compared
    sys.modules["liger_kernel"] = None  # type: ignore[assignment]  # Triton launches no fake kernel
    cases = [Case(**fields) for fields in json.loads(Path(sys.argv[1]).read_text("utf-8"))]
    found = []
    for case in cases:
        case = dataclasses.replace(case, capability=tuple(case.capability))
        try:
            found.append((loss if case.task == "loss" else train)(case))
        except Exception as error:
            traceback.print_exc()
            found.append(Found(error=f"{type(error).__name__}: {error}".splitlines()[0]))
    Path(sys.argv[2]).write_text(json.dumps([dataclasses.asdict(each) for each in found]), "utf-8")


if __name__ == "__main__":
    main()
