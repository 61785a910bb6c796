"""The language model, all of it trained: float32 weights, computed in bfloat16."""

import torch
from transformers import AutoModelForCausalLM

llm = dict(
    type=AutoModelForCausalLM.from_pretrained,
    pretrained_model_name_or_path=MODEL_PATH_HERE,
    dtype=torch.float32,
)
