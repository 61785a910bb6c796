"""Every LLaVA config builds on tiny stand-ins and takes a step."""

import pytest
import torch

from tests.helpers.tiers import few_fast
from tests.helpers.tiny import save_tiny
from tests.helpers.vision_language import SIZE, save_clip
from xtuner import configs
from xtuner.config import load_config
from xtuner.registry import BUILDER

NAMES = [name for name in configs.names() if name.startswith("llava_") and "onevision" not in name]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava_configs")
    return str(save_tiny(folder / "llm")), str(save_clip(folder / "clip"))


def test_the_published_ones_are_among_them():
    assert len(NAMES) >= 33


@pytest.mark.parametrize("name", few_fast(NAMES, NAMES[::4]))
def test_it_takes_a_step(name, places):
    llm, clip = places
    options = [f"llm_name_or_path={llm}", f"visual_encoder_name_or_path={clip}"]
    if "pretrained_pth =" in configs.render(name):
        options.append("pretrained_pth=None")
    cfg = load_config(name, options)
    model = BUILDER.build(cfg.model)
    ids = torch.tensor([[5, -200, 7, 8, 9]])
    batch = {
        "input_ids": ids,
        "labels": torch.tensor([[-100, -100, 7, 8, 9]]),
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, SIZE, SIZE),
    }
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(batch)["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    for key, weight in model.named_parameters():
        if weight.requires_grad:
            assert weight.grad is not None, key
