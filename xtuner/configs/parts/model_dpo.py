"""Direct preference optimization."""

from xtuner.model.dpo import DPO

model = dict(
    type=DPO,
    use_varlen_attn=use_varlen_attn,
    loss_type=dpo_loss_type,
    beta=loss_beta,
    label_smoothing=label_smoothing,
    llm=LLM_HERE,
    **LORA_HERE,
)
