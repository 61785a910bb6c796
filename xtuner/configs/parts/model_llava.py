"""A language model that sees: a visual encoder, a projector and a language model."""

from transformers import CLIPVisionModel
from xtuner.model import LLaVAModel

model = dict(
    type=LLaVAModel,
    freeze_llm=FREEZE_LLM_HERE,
    freeze_visual_encoder=FREEZE_VISUAL_HERE,
    **PRETRAINED_HERE,
    llm=LLM_HERE,
    **LLM_LORA_HERE,
    visual_encoder=dict(
        type=CLIPVisionModel.from_pretrained,
        pretrained_model_name_or_path=visual_encoder_name_or_path,
    ),
    **VISUAL_LORA_HERE,
)
