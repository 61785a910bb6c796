"""Fine-tune all weights with transformers' Trainer on XTuner's Alpaca rows.

Example: ``python train_hf.py --model_name_or_path internlm/internlm2_5-1_8b``
All arguments of TrainingArguments can be given too.
"""

from dataclasses import dataclass, field

from transformers import HfArgumentParser, Trainer

from xtuner.apis import (
    DefaultTrainingArguments,
    alpaca_data_collator,
    alpaca_dataset,
    build_model,
)


@dataclass
class Choice:
    """What is trained on what."""

    model_name_or_path: str = field(metadata={"help": "a folder or a hub name"})
    data_path: str = field(
        default="tatsu-lab/alpaca", metadata={"help": "a hub name or a JSON file of Alpaca rows"}
    )
    max_length: int = field(default=2048, metadata={"help": "tokens of a row"})


def train() -> None:
    """Train and save."""
    choice, arguments = HfArgumentParser(
        (Choice, DefaultTrainingArguments)
    ).parse_args_into_dataclasses()
    model, tokenizer = build_model(choice.model_name_or_path)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=alpaca_dataset(
            tokenizer, path=choice.data_path, max_length=choice.max_length
        ),
        data_collator=alpaca_data_collator(return_hf_format=True),
    )
    trainer.train()
    trainer.save_model()
    tokenizer.save_pretrained(arguments.output_dir)


if __name__ == "__main__":
    train()
