"""Trains with LLaMA-Factory, in its own environment, for ``benchmarks/peers.py``.

Usage: ``python llama_factory.py FOLDER METHOD RECIPE DTYPE MAX_LENGTH PACKS_A_STEP WARM_STEPS
STEPS``, on the last line of whose output are the facts as JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import measuring
from transformers import Trainer, TrainerCallback

try:
    import torchaudio  # noqa: F401
except (ImportError, OSError):  # there is none for a torch without CUDA, and rows of text need none
    sys.modules["torchaudio"] = ModuleType("torchaudio")

from llamafactory.train.tuner import run_exp


class Timer(TrainerCallback):
    """Tells the clock of each step."""

    def __init__(self, warm: int, timed: int) -> None:
        self.clock, self.tokens = measuring.Clock(warm, timed), 0

    def count(self) -> None:
        """Count the tokens of each batch, without padding; its own count takes masks for tokens."""
        original = Trainer.training_step

        def counting(trainer: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            padding = trainer.processing_class.pad_token_id
            self.tokens += int((inputs["input_ids"] != padding).sum())
            return original(trainer, model, inputs, *args, **kwargs)

        Trainer.training_step = counting

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Each step is logged, with its loss."""
        if logs and "loss" in logs:
            self.clock.step(self.tokens, float(logs["loss"]))
            self.tokens = 0


def settings(
    folder: Path, case: measuring.Case, max_length: int, batch_size: int, steps: int
) -> dict[str, Any]:
    """The arguments of ``llamafactory-cli train``."""
    import torch

    columns = {"prompt": "prompt", "response": "completion"}
    rows = {"rows": {"file_name": "rows.json", "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(rows), "utf-8")
    found: dict[str, Any] = dict(
        stage="sft",
        do_train=True,
        model_name_or_path=str(folder),
        dataset="rows",
        dataset_dir=str(folder),
        cutoff_len=max_length,
        neat_packing=True,  # samples of a pack do not see each other, as on the other sides
        finetuning_type="full" if case.method == "full" else "lora",
        disable_gradient_checkpointing=not case.settings.checkpointing,
        output_dir=tempfile.mkdtemp(dir=folder),  # it refuses one that was written to
        per_device_train_batch_size=batch_size,
        max_steps=steps,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        bf16=case.mixed,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    if case.method != "full":
        recipe = case.settings
        found |= dict(lora_rank=recipe.r, lora_alpha=recipe.lora_alpha)
        found |= dict(lora_dropout=recipe.lora_dropout, lora_target="all")
    if case.method == "qlora":
        found |= dict(quantization_bit=4, quantization_type="nf4", double_quantization=True)
    return found


def main() -> None:
    folder, method, recipe, dtype, *numbers = sys.argv[1:]
    max_length, batch_size, warm, timed = map(int, numbers)
    timer = Timer(warm, timed)
    timer.count()
    wanted = settings(
        Path(folder),
        measuring.Case(method, recipe, dtype),
        max_length,
        batch_size,
        timer.clock.total,
    )
    run_exp(wanted, callbacks=[timer])
    print("\n" + json.dumps(timer.clock.facts()))


if __name__ == "__main__":
    main()
