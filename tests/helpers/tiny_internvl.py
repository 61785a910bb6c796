"""A stand-in for InternVL that brings its own code, as the hub's models do."""

from __future__ import annotations

import json
from pathlib import Path

CODE = """
import torch
from torch import nn
from transformers import (
    CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PretrainedConfig,
    PreTrainedModel,
)


class TinyInternVLConfig(PretrainedConfig):
    model_type = "tiny_internvl"
    sub_configs = {"vision_config": CLIPVisionConfig, "llm_config": LlamaConfig}

    def __init__(self, vision_config=None, llm_config=None, **kwargs):
        self.vision_config = CLIPVisionConfig(**(vision_config or {}))
        self.llm_config = LlamaConfig(**(llm_config or {}))
        self.downsample_ratio = 0.5
        self.min_dynamic_patch, self.max_dynamic_patch, self.use_thumbnail = 1, 4, True
        super().__init__(**kwargs)


class TinyInternVL(PreTrainedModel):
    config_class = TinyInternVLConfig
    base_model_prefix = "language_model"

    def __init__(self, config):
        super().__init__(config)
        self.vision_model = CLIPVisionModel(config.vision_config)
        self.language_model = LlamaForCausalLM(config.llm_config)
        wide, narrow = config.vision_config.hidden_size * 4, config.llm_config.hidden_size
        self.mlp1 = nn.Sequential(nn.LayerNorm(wide), nn.Linear(wide, narrow))
        self.img_context_token_id = None
        self.post_init()

    def extract_feature(self, pixel_values):
        seen = self.vision_model(pixel_values=pixel_values).last_hidden_state[:, 1:]
        tiles, patches, width = seen.shape
        return self.mlp1(seen.reshape(tiles, patches // 4, width * 4))
"""


def save_internvl(folder: Path) -> Path:
    """Save model, code and tokenizer; four features to a tile of 32 pixels."""
    import torch
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    from tests.helpers.tiny import make_tokenizer

    folder.mkdir(parents=True)
    (folder / "modeling_tiny_internvl.py").write_text(CODE, "utf-8")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<img>", "<IMG_CONTEXT>", "</img>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    name = "modeling_tiny_internvl.TinyInternVL"
    make_config = get_class_from_dynamic_module(f"{name}Config", str(folder))
    make_model = get_class_from_dynamic_module(name, str(folder))
    config = make_config(
        vision_config=dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        ),
        llm_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
        ),
    )
    torch.manual_seed(0)
    make_model(config).save_pretrained(folder)
    file = folder / "config.json"
    settings = json.loads(file.read_text("utf-8"))
    settings["auto_map"] = {"AutoConfig": f"{name}Config", "AutoModel": name}
    file.write_text(json.dumps(settings), "utf-8")
    return folder
