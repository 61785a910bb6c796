"""InternVL, which loads its own language model and visual encoder."""

from xtuner.model import InternVL_V1_5

model = dict(
    type=InternVL_V1_5,
    model_path=path,
    freeze_llm=FREEZE_LLM_HERE,
    freeze_visual_encoder=True,
    **QUANTIZATION_HERE,
    **LLM_LORA_HERE,
)
