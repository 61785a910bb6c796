"""Supervised fine-tuning."""

from xtuner.model import SupervisedFinetune

model = dict(
    type=SupervisedFinetune,
    use_varlen_attn=use_varlen_attn,
    llm=LLM_HERE,
    **LORA_HERE,
)
