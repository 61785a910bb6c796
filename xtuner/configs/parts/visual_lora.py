"""The adapters of the visual encoder."""

from peft import LoraConfig

lora = dict(
    type=LoraConfig,
    r=64,
    lora_alpha=16,
    lora_dropout=0.05,
    bias="none",
)
