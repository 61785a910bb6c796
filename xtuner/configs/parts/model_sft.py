"""Supervised fine-tuning."""

from xtuner.model import SupervisedFinetune

model = dict(
    type=SupervisedFinetune,
    use_varlen_attn=use_varlen_attn,
    **TOKENIZER_HERE,
    llm=LLM_HERE,
    **LORA_HERE,
)
