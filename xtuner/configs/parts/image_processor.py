"""What turns an image into numbers for the visual encoder."""

from transformers import CLIPImageProcessor

image_processor = dict(
    type=CLIPImageProcessor.from_pretrained,
    pretrained_model_name_or_path=visual_encoder_name_or_path,
)
