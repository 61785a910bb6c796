"""Odds-ratio preference optimization on text and images."""

from xtuner.model import VisionLanguageORPO

model = dict(
    type=VisionLanguageORPO,
    use_varlen_attn=use_varlen_attn,
    beta=loss_beta,
    freeze_visual_encoder=freeze_visual_encoder,
    freeze_projector=freeze_projector,
    processor=processor,
    llm=LLM_HERE,
    **LORA_HERE,
)
