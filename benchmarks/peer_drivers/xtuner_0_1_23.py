"""Trains with XTuner 0.1.23, in its own environment, for ``benchmarks/peers.py``.

Usage: ``python xtuner_0_1_23.py FOLDER METHOD RECIPE DTYPE MAX_LENGTH PACKS_A_STEP WARM_STEPS
STEPS``, on the last line of whose output are the facts as JSON. Mixed precision of mmengine needs a
GPU: without one all is float32. Samples of a pack see each other, as its variable-length attention
needs a GPU.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import datasets  # noqa: F401  # looks for torchvision
import measuring
import torch
from mmengine.config import ConfigDict
from mmengine.dataset import DefaultSampler
from mmengine.hooks import Hook
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.runner import Runner
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

try:
    import torchvision  # noqa: F401
except (ImportError, RuntimeError):  # there is none for a torch without CUDA; only images need it
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
        sys.modules[name] = MagicMock(__version__="none")

from xtuner.dataset.collate_fns import default_collate_fn
from xtuner.engine.runner import TrainLoop
from xtuner.model import SupervisedFinetune


class Timer(Hook):
    """Tells the clock of each step."""

    def __init__(self, warm: int, timed: int) -> None:
        self.clock = measuring.Clock(warm, timed)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """One micro-batch is one step here."""
        tokens = int(data_batch["data"]["input_ids"].numel())
        self.clock.step(tokens, float(outputs["loss"]))


def model(folder: str, case: measuring.Case, gpu: bool) -> dict[str, Any]:
    """As its configs have it."""
    llm = ConfigDict(
        type=AutoModelForCausalLM.from_pretrained,
        pretrained_model_name_or_path=folder,
        torch_dtype=torch.bfloat16 if gpu and case.method != "full" else torch.float32,
    )
    if case.method == "qlora":
        llm["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if gpu else torch.float32,
        )
    lora = None
    recipe = case.settings
    if case.method != "full":
        settings = {key: value for key, value in recipe.lora().items() if key != "target_modules"}
        lora = ConfigDict(type=LoraConfig, task_type="CAUSAL_LM", **settings)
    checkpointing = {"use_activation_checkpointing": recipe.checkpointing}
    return dict(type=SupervisedFinetune, llm=llm, lora=lora, **checkpointing)


def main() -> None:
    folder, method, recipe, dtype, _, batch_size, warm, timed = sys.argv[1:]
    gpu = torch.cuda.is_available()
    timer = Timer(int(warm), int(timed))
    precision = dict(type=AmpOptimWrapper, dtype="bfloat16") if gpu else dict(type=OptimWrapper)
    runner = Runner(
        model=model(folder, measuring.Case(method, recipe, dtype), gpu),
        work_dir=str(Path(folder) / "xtuner_0_1_23"),
        train_dataloader=dict(
            batch_size=int(batch_size),
            num_workers=0,
            dataset=json.loads((Path(folder) / "packs.json").read_text("utf-8")),
            sampler=dict(type=DefaultSampler, shuffle=False),
            collate_fn=default_collate_fn,
        ),
        train_cfg=dict(type=TrainLoop, max_iters=timer.clock.total),
        optim_wrapper=precision
        | dict(
            optimizer=dict(type=torch.optim.AdamW, lr=1e-4, weight_decay=0.0),
            clip_grad=dict(max_norm=1.0),
        ),
        default_hooks=dict(checkpoint=None, logger=None),
        custom_hooks=[timer],
        default_scope="xtuner",
        log_level="WARNING",
        randomness=dict(seed=0),
    )
    runner.train()
    print("\n" + json.dumps(timer.clock.facts() | {"precision": "bf16" if gpu else "float32"}))


if __name__ == "__main__":
    main()
