"""What turns images into numbers and tokens, as the model's own code does."""

from xtuner.tokenization.processor import load_processor

processor = dict(type=load_processor, name_or_path=pretrained_model_name_or_path)
