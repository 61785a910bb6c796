"""The adapters of InternVL's language model; without targets, all its linear layers."""

from peft import LoraConfig

lora = dict(
    type=LoraConfig,
    r=128,
    lora_alpha=256,
    lora_dropout=0.05,
    target_modules=None,
    task_type="CAUSAL_LM",
)
