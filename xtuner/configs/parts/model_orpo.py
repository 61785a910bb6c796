"""Odds-ratio preference optimization."""

from xtuner.model.orpo import ORPO

model = dict(
    type=ORPO,
    use_varlen_attn=use_varlen_attn,
    beta=loss_beta,
    llm=LLM_HERE,
    **LORA_HERE,
)
