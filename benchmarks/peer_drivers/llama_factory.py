"""Trains with LLaMA-Factory, in its own environment, for ``benchmarks/peers.py``.

Usage: ``python llama_factory.py FOLDER METHOD MAX_LENGTH PACKS_A_STEP``, on the last line of whose
output are the facts as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import speed
from transformers import TrainerCallback

try:
    import torchaudio  # noqa: F401
except (ImportError, OSError):  # there is none for a torch without CUDA, and rows of text need none
    sys.modules["torchaudio"] = ModuleType("torchaudio")

from llamafactory.train.tuner import run_exp


class Timer(TrainerCallback):
    """Tells the clock of each step."""

    def __init__(self) -> None:
        self.clock, self.tokens = speed.Clock(), 0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Each step is logged, with its loss and the tokens that were seen so far."""
        if logs and "loss" in logs:
            seen = int(state.num_input_tokens_seen)
            self.clock.step(seen - self.tokens, float(logs["loss"]))
            self.tokens = seen


def settings(folder: Path, method: str, max_length: int, batch_size: int) -> dict[str, Any]:
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
        packing=True,  # its template is the tokenizer's own
        finetuning_type="full" if method == "full" else "lora",
        disable_gradient_checkpointing=True,
        output_dir=str(folder / "llama_factory"),
        per_device_train_batch_size=batch_size,
        max_steps=speed.WARM_STEPS + speed.STEPS,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        include_num_input_tokens_seen="non_padding",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    if method != "full":
        found |= dict(lora_rank=16, lora_alpha=32, lora_dropout=0.0, lora_target="all")
    if method == "qlora":
        found |= dict(quantization_bit=4, quantization_type="nf4", double_quantization=True)
    return found


def main() -> None:
    folder, method, max_length, batch_size = sys.argv[1:]
    timer = Timer()
    run_exp(settings(Path(folder), method, int(max_length), int(batch_size)), callbacks=[timer])
    print("\n" + json.dumps(timer.clock.facts()))


if __name__ == "__main__":
    main()
