"""A reward model."""

from xtuner.model.reward import RewardModel

model = dict(
    type=RewardModel,
    use_varlen_attn=use_varlen_attn,
    loss_type=loss_type,
    penalty_type=penalty_type,
    llm=LLM_HERE,
    **LORA_HERE,
)
