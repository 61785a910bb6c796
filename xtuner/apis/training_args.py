"""``TrainingArguments`` with the defaults that suit fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class DefaultTrainingArguments(TrainingArguments):
    """transformers' ``TrainingArguments``, all of them, with other defaults."""

    output_dir: str = field(default="./work_dirs", metadata={"help": "where everything goes"})
    per_device_train_batch_size: int = field(
        default=1, metadata={"help": "sequences of a micro-batch on one device"}
    )
    gradient_accumulation_steps: int = field(
        default=16, metadata={"help": "micro-batches of an optimizer step"}
    )
    learning_rate: float = field(default=2e-5, metadata={"help": "highest learning rate"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to it"})
    num_train_epochs: float = field(default=1.0, metadata={"help": "passes over the data"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "how the rate falls"})
    warmup_steps: float = field(default=0.03, metadata={"help": "steps, or below 1 a share"})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "leave the columns to the collator"}
    )
