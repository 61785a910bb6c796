"""Attention of encoders whose images share a row: by our function as by torch's for each image.

transformers hands ``cu_seq_lens_q`` to a function whose name has "flash" in it, in code of each
class. The classes are tried at their default sizes with random weights.
"""

import importlib
import inspect

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.tiers import few_fast
from xtuner.model.modules import attention

CU_SEQLENS = torch.tensor([0, 7, 16, 24], dtype=torch.int32)
TOKENS = 24
CLASSES = (
    "cohere_compass.CohereCompassVisionAttention",
    "cosmos3_edge.Cosmos3EdgeVisionAttention",
    "dots3_note.Dots3NoteVisionAttention",
    "ernie4_5_vl_moe.Ernie4_5_VLMoeVisionAttention",
    "exaone4_5.Exaone4_5_VisionAttention",
    "glm4v.Glm4vVisionAttention",
    "glm4v_moe.Glm4vMoeVisionAttention",
    "glm5_next.Glm5NextVisionAttention",
    "glm_ocr.GlmOcrVisionAttention",
    "inkling2.Inkling2VisionAttention",
    "kimi_k25.Kimi_K25VisionAttention",
    "lfm3_vl.Lfm3VlVisionAttention",
    "minicpm_ocr.MiniCPMOcrVisionAttention",
    "minicpmv4_6.MiniCPMV4_6VisionAttention",
    "minicpmv4_7.MiniCPMV4_7VisionAttention",
    "minimax_m3_vl.MiniMaxM3VLVisionAttention",
    "muse_glimmer.MuseGlimmerVisionAttention",
    "muse_spark.MuseSparkVisionAttention",
    "paddleocr_vl.PaddleOCRVisionAttention",
    "qwen2_5_omni.Qwen2_5OmniVisionAttention",
    "qwen2_5_vl.Qwen2_5_VLVisionAttention",
    "qwen2_vl.VisionAttention",
    "qwen3_5.Qwen3_5VisionAttention",
    "qwen3_5_moe.Qwen3_5MoeVisionAttention",
    "qwen3_omni_moe.Qwen3OmniMoeVisionAttention",
    "qwen3_vl.Qwen3VLVisionAttention",
    "qwen3_vl_moe.Qwen3VLMoeVisionAttention",
    "qwen4_exp.Qwen4ExpVisionAttention",
    "video_llama_3.VideoLlama3VisionAttention",
)
FAST = ("lfm3_vl.Lfm3VlVisionAttention", "minicpm_ocr.MiniCPMOcrVisionAttention")


def make(name: str) -> nn.Module:
    """A layer's attention at its default size."""
    kind, name = name.split(".")
    models = f"transformers.models.{kind}"
    modeling = vars(importlib.import_module(f"{models}.modeling_{kind}"))
    configs = vars(importlib.import_module(f"{models}.configuration_{kind}"))
    taken = inspect.signature(modeling[name].__init__).parameters
    config = taken["config"].annotation
    if config is inspect.Parameter.empty:
        (config,) = (c for n, c in configs.items() if n.endswith("VisionConfig"))
    elif isinstance(config, str):
        config = modeling[config]
    torch.manual_seed(0)
    settings = {"layer_idx": 0} if "layer_idx" in taken else {}
    return modeling[name](config(), **settings).eval()


def attend(layer: nn.Module, implementation: str, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The output and the gradient of its input."""
    layer.config._attn_implementation = implementation
    hidden = hidden.clone().requires_grad_()
    taken = inspect.signature(layer.forward).parameters
    inputs = {"cu_seqlens": CU_SEQLENS}
    if "position_embeddings" in taken:
        angles = torch.rand(TOKENS, layer.head_dim, generator=torch.Generator().manual_seed(1))
        inputs["position_embeddings"] = (angles.cos(), angles.sin())
    if "max_seqlen" in taken:
        inputs["max_seqlen"] = 9
    out = layer(hidden, **inputs)
    out = out[0] if isinstance(out, tuple) else out
    (out**2).sum().backward()
    return out.detach(), hidden.grad


@pytest.mark.parametrize("name", few_fast(CLASSES, FAST))
def test_images_of_a_row_are_the_images_alone(name):
    attention.register()
    layer = make(name)
    assert layer.is_causal is False  # by which use_attention_in_encoders finds it
    width = next(m.in_features for m in layer.modules() if isinstance(m, nn.Linear))
    hidden = torch.randn(1, TOKENS, width, generator=torch.Generator().manual_seed(2))
    if not name.startswith("minicpm"):
        hidden = hidden[0]
    found = attend(layer, attention.PACKED_ENCODER, hidden)
    torch.testing.assert_close(found, attend(layer, "sdpa", hidden))
