"""The language model frozen in 8 bits, for adapters."""

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

llm = dict(
    type=AutoModelForCausalLM.from_pretrained,
    pretrained_model_name_or_path=MODEL_PATH_HERE,
    dtype=torch.bfloat16,
    quantization_config=dict(type=BitsAndBytesConfig, load_in_8bit=True),
)
