"""The language model frozen in 4 bits, for adapters."""

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

llm = dict(
    type=AutoModelForCausalLM.from_pretrained,
    pretrained_model_name_or_path=MODEL_PATH_HERE,
    dtype=torch.bfloat16,
    quantization_config=dict(
        type=BitsAndBytesConfig,
        load_in_4bit=True,
        load_in_8bit=False,
        llm_int8_threshold=6.0,
        llm_int8_has_fp16_weight=False,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
    ),
)
