"""The tokenizer."""

from transformers import AutoTokenizer

tokenizer = dict(
    type=AutoTokenizer.from_pretrained,
    pretrained_model_name_or_path=MODEL_PATH_HERE,
    padding_side=PADDING_SIDE_HERE,
    **TOKENIZER_FIELDS_HERE,
)
