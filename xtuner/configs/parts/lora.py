"""The adapters."""

from peft import LoraConfig

lora = dict(
    type=LoraConfig,
    r=LORA_R_HERE,  # rank of the adapters
    lora_alpha=LORA_ALPHA_HERE,  # scale of the adapters: lora_alpha / r
    lora_dropout=LORA_DROPOUT_HERE,
    bias="none",
    **LORA_TARGETS_HERE,
    task_type=LORA_TASK_HERE,
)
