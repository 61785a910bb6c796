"""Supervised fine-tuning on text and images."""

from xtuner.model import VisionLanguageFinetune

model = dict(
    type=VisionLanguageFinetune,
    use_varlen_attn=use_varlen_attn,
    freeze_visual_encoder=freeze_visual_encoder,
    freeze_projector=freeze_projector,
    processor=processor,
    llm=LLM_HERE,
    **LORA_HERE,
)
