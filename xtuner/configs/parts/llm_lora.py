"""The language model frozen in bfloat16, for adapters."""

import torch
from transformers import AutoModelForCausalLM

llm = dict(
    type=AutoModelForCausalLM.from_pretrained,
    pretrained_model_name_or_path=MODEL_PATH_HERE,
    dtype=torch.bfloat16,
)
