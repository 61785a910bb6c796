"""Stage 2: models of 1.5B to 8B with random weights: tokens/s and memory, beside peers.

A step is one sample. Products are in bf16 by autocast, layers are recomputed in the backward pass;
full training keeps weights in float32, LoRA a base in bf16, QLoRA one in 4 bits.
"""

from __future__ import annotations

import gc
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import measuring
import torch

from gpu_checks.items import AbsentError, Facts, Item, Setting
from gpu_checks.quantizing import quantize

GIB = 2**30
SHAPES: dict[str, dict[str, Any]] = {
    "llama2_7b": dict(model_type="llama", vocab_size=32000, hidden_size=4096)
    | dict(intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    | dict(num_key_value_heads=32, max_position_embeddings=32768),
    "qwen2_5_7b": dict(model_type="qwen2", vocab_size=152064, hidden_size=3584)
    | dict(intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28)
    | dict(num_key_value_heads=4, max_position_embeddings=32768, tie_word_embeddings=False),
    "qwen3_8b": dict(model_type="qwen3", vocab_size=151936, hidden_size=4096, head_dim=128)
    | dict(intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32)
    | dict(num_key_value_heads=8, max_position_embeddings=40960, tie_word_embeddings=False),
    "qwen2_5_1_5b": dict(model_type="qwen2", vocab_size=151936, hidden_size=1536)
    | dict(intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12)
    | dict(num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True),
}
TINY: dict[str, Any] = dict(vocab_size=512, hidden_size=64, intermediate_size=128)
TINY |= dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
TINY_LENGTH = 48
"""Tokens of a step in a dry run."""
CASES = (
    *(("qwen2_5_7b", "lora", length) for length in (8192, 2048)),
    *(("qwen2_5_7b", "qlora", length) for length in (2048, 8192)),
    ("qwen2_5_1_5b", "full", 8192),
    *(("llama2_7b", method, length) for method in ("qlora", "lora") for length in (2048, 8192)),
    *(("qwen3_8b", method, length) for method in ("lora", "qlora") for length in (8192, 2048)),
    *((shape, "full", 2048) for shape in ("qwen2_5_7b", "llama2_7b", "qwen3_8b")),
    *(("qwen2_5_7b", method, 32768) for method in ("lora", "qlora")),
)
"""(shape, method, tokens of a step), the most important first."""
BESIDE_PEERS = (*CASES[:3], CASES[4])
OFFLOADED = (("qwen2_5_7b", "lora", 8192), ("qwen2_5_7b", "lora", 32768))
"""Cases that are measured with inputs of layers in main memory, too."""


@dataclass(frozen=True)
class Case:
    """What one process measures."""

    shape: str
    method: str
    length: int

    @property
    def name(self) -> str:
        return f"{self.shape}/{self.method}/{self.length}"

    def config(self, setting: Setting) -> Any:
        """The model's configuration."""
        from transformers import AutoConfig

        sizes = dict(SHAPES[self.shape]) | (TINY if setting.dry else {})
        return AutoConfig.for_model(sizes.pop("model_type"), **sizes)

    def tokens(self, setting: Setting) -> int:
        return TINY_LENGTH if setting.dry else self.length


class DeviceClock(measuring.Clock):
    """Times steps on a GPU, to their end there, and knows what they hold of its memory."""

    def step(self, tokens: int, loss: float) -> None:
        torch.cuda.synchronize()
        super().step(tokens, loss)

    def peak_mib(self) -> float:
        return torch.cuda.max_memory_allocated() / 2**20


def ours(setting: Setting, case: Case, *, offload: bool = False) -> Facts:
    """By the training loop of ``xtuner train``.

    Args:
        setting: where it runs.
        case: what is trained.
        offload: keep the inputs of layers in main memory.
    """
    from xtuner.model.modules import attention

    llm = build(case, setting, attention.register())
    clock = _clock(case, setting)
    length = case.tokens(setting)
    packs = [row | {"cumulative_len": [0, length]} for row in rows(llm, length, clock.total)]
    model = dict(llm=llm, lora=measuring.adapter(case.method))
    if offload:
        model["use_activation_checkpointing"] = dict(offload=True)
    measuring.run_ours(setting.folder, model, packs, 1, clock, setting.device)
    return _facts(clock, llm, case, setting)


def trl(setting: Setting, case: Case) -> Facts:
    """By TRL's SFTTrainer, with liger-kernel where it is installed."""
    try:
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise AbsentError(str(error)) from None
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from transformers.utils import is_liger_kernel_available

    llm = build(case, setting, "sdpa")
    clock, liger = _clock(case, setting), is_liger_kernel_available()

    class Timer(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.step(case.tokens(setting), math.nan)  # TRL keeps it

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, "<pad>"))
    special = dict(pad_token="<pad>", eos_token="</s>", unk_token="<pad>")
    SFTTrainer(
        model=llm,
        args=SFTConfig(
            output_dir=str(setting.folder / "trl"),
            per_device_train_batch_size=1,
            max_steps=clock.total,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            bf16=True,
            use_cpu=setting.device == "cpu",
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            max_length=case.tokens(setting),
            save_strategy="no",
            report_to=[],
            logging_strategy="no",
            disable_tqdm=True,
            use_liger_kernel=liger and setting.device == "cuda",
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=Dataset.from_list(rows(llm, case.tokens(setting), clock.total)),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, **special),
        peft_config=measuring.adapter(case.method),
        callbacks=[Timer()],
    ).train()
    return _facts(clock, llm, case, setting) | {"liger": liger}


def plain(setting: Setting, case: Case) -> Facts:
    """By a loop as in a tutorial: ``model(...)``, backward, clip, ``AdamW.step``."""
    from peft import get_peft_model

    llm = build(case, setting, "sdpa")
    model = llm if case.method == "full" else get_peft_model(llm, measuring.adapter(case.method))
    llm.gradient_checkpointing_enable({"use_reentrant": False})
    llm.config.use_cache = False
    if case.method != "full":
        llm.enable_input_require_grads()
    clock, trained = _clock(case, setting), [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    model.train()
    for row in rows(llm, case.tokens(setting), clock.total):
        ids = torch.tensor([row["input_ids"]], device=setting.device)
        with torch.autocast(setting.device, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.step(ids.numel(), loss.item())
    return _facts(clock, llm, case, setting)


def planned(setting: Setting, case: Case) -> Facts:
    """The memory of the same run as ``xtuner plan`` has it."""
    from xtuner.config.load import load
    from xtuner.planning.plan import Machine, Planner

    folder = setting.folder / "model"
    config = case.config(setting)
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    config.save_pretrained(folder)
    file = setting.folder / "config.py"
    file.write_text(_config_text(case, folder, case.tokens(setting)), "utf-8")
    memory = Planner().plan(load(file), Machine()).memory
    parts = {what: round(size / GIB, 3) for what, size in memory.parts()}
    return {"total GiB": round(memory.total / GIB, 3), "parts": parts}


def _config_text(case: Case, folder: Path, length: int) -> str:
    dtype = measuring.loading(case.method)["dtype"]
    llm = [f"pretrained_model_name_or_path={str(folder)!r}", f"dtype={dtype!r}"]
    if case.method == "qlora":
        llm.append(
            "quantization_config=dict(type=BitsAndBytesConfig, load_in_4bit=True, "
            "bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True)"
        )
    adapter = ", ".join(f"{key}={value!r}" for key, value in measuring.Recipe().lora().items())
    lora = f"dict(type=LoraConfig, task_type='CAUSAL_LM', {adapter})"
    return f"""
from mmengine.optim import AmpOptimWrapper
from peft import LoraConfig
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from xtuner.model import SupervisedFinetune

model = dict(
    type=SupervisedFinetune,
    use_varlen_attn=True,
    llm=dict(type=AutoModelForCausalLM.from_pretrained, {", ".join(llm)}),
    lora={None if case.method == "full" else lora},
)
train_dataloader = dict(batch_size=1, dataset=dict(max_length={length}))
optim_wrapper = dict(type=AmpOptimWrapper, optimizer=dict(type=AdamW), dtype="bfloat16")
"""


def build(case: Case, setting: Setting, attention: str) -> Any:
    """A transformers model with random weights, made where it is trained.

    Raises:
        AbsentError: when the weights, gradients and states alone are more than the GPU has.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = case.config(setting)
    full = case.method == "full"
    settings = dict(dtype=torch.float32 if full else torch.bfloat16, attn_implementation=attention)
    if full and setting.device == "cuda":
        with torch.device("meta"):
            count = AutoModelForCausalLM.from_config(config, **settings).num_parameters()
        memory = torch.cuda.get_device_properties(0).total_memory
        if 16 * count > memory:
            needed = f"{16 * count / GIB:.0f} GiB of weights, gradients and AdamW's states"
            raise AbsentError(f"{needed} do not fit into {memory / GIB:.0f} GiB")
    with torch.device(setting.device):
        model = AutoModelForCausalLM.from_config(config, **settings)
    if case.method == "qlora":
        quantize(model, setting.device)
    gc.collect()
    if setting.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # what quantising took is not training's
    return model


def rows(llm: Any, length: int, count: int) -> list[dict[str, Any]]:
    """Random samples."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(llm.config.vocab_size, (count, length), generator=draw).tolist()
    return [{"input_ids": each, "labels": each} for each in ids]


def flops_per_token(llm: Any, method: str, length: int) -> float:
    """Of the products of a step, without those that are computed again for checkpointing.

    A weight takes 2 forward, 2 for the gradient of its input and, if trained, 2 for its own;
    attention, causal, twice as many backward as forward. The adapter is left out.
    """
    config = llm.config
    linears = [
        layer
        for name, layer in llm.named_modules()
        if isinstance(layer, torch.nn.Linear) and "lora_" not in name  # 4 bits too
    ]
    weights = sum(layer.in_features * layer.out_features for layer in linears)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    wide = config.num_attention_heads * width * config.num_hidden_layers
    return (6.0 if method == "full" else 4.0) * weights + 3 * 2 * 2 * (length / 2) * wide


def _clock(case: Case, setting: Setting) -> measuring.Clock:
    if setting.device == "cpu":
        return measuring.Clock(1, 2)
    return DeviceClock(2, 4 if case.length > 4096 else 8)


def _facts(clock: measuring.Clock, llm: Any, case: Case, setting: Setting) -> Facts:
    found = clock.facts()
    work = found["tokens_per_second"] * flops_per_token(llm, case.method, case.tokens(setting))
    facts = {
        "tokens/s": round(found["tokens_per_second"], 1),
        "TFLOP/s": work / 1e12,
        "peak GiB": round(found["peak_mib"] / 1024, 2),
    }
    if not math.isnan(found["loss"]):
        facts["loss"] = round(found["loss"], 3)
    if setting.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        facts["held GiB"] = round((total - free) / GIB, 2)  # with CUDA's context and gaps
    return facts


def timed(setting: Setting, case: Case, side: Any) -> Facts:
    """A side's figures; a case that the GPU has no memory for is absent."""
    begun = time.perf_counter()
    try:
        facts: Facts = side(setting, case)
    except torch.OutOfMemoryError as error:
        raise AbsentError(f"out of memory: {str(error).splitlines()[0][:120]}") from None
    return facts | {"seconds in all": round(time.perf_counter() - begun, 1)}


def items(dry: bool) -> list[Item]:
    """The checks of this file; in a dry run one length, as all are the same there.

    Those of ours and of the peers come in the order of ``CASES``, plans beside them.
    """
    found: list[Item] = []
    done: set[tuple[str, str]] = set()
    for each in CASES:
        case = Case(*each)
        if dry and (case.shape, case.method) in done:
            continue
        done.add((case.shape, case.method))
        sides = {"ours": ours, "trl": trl, "plain": plain}
        for name, side in sides.items():
            if name == "ours" or each in BESIDE_PEERS:
                check = partial(timed, case=case, side=side)
                found.append(Item(f"{case.name}/{name}", 2, check, 60, alone=True))
        if each in OFFLOADED:
            check = partial(timed, case=case, side=partial(ours, offload=True))
            found.append(Item(f"{case.name}/ours, offload", 2, check, 60, alone=True))
        check = partial(planned, case=case)
        found.append(Item(f"{case.name}/plan", 2, check, 60, on_cpu=True))
    return found
