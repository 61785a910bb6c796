"""A reward model on text and images."""

from xtuner.model import VisionLanguageRewardModel

model = dict(
    type=VisionLanguageRewardModel,
    use_varlen_attn=use_varlen_attn,
    loss_type=loss_type,
    penalty_type=penalty_type,
    freeze_visual_encoder=freeze_visual_encoder,
    freeze_projector=freeze_projector,
    processor=processor,
    llm=LLM_HERE,
    **LORA_HERE,
)
