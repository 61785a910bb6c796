"""Direct preference optimization on text and images."""

from xtuner.model import VisionLanguageDPO

model = dict(
    type=VisionLanguageDPO,
    use_varlen_attn=use_varlen_attn,
    loss_type=dpo_loss_type,
    beta=loss_beta,
    label_smoothing=label_smoothing,
    freeze_visual_encoder=freeze_visual_encoder,
    freeze_projector=freeze_projector,
    processor=processor,
    llm=LLM_HERE,
    **LORA_HERE,
)
