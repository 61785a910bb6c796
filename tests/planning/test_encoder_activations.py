"""What LLaVA and InternVL 1.5 and 2 keep of images, beside what torch's hooks count."""

import pytest
import torch
from peft import LoraConfig
from torch import nn

from tests.helpers.architectures import make_architecture
from tests.helpers.tiers import slow
from tests.helpers.tiny_internvl import save_internvl
from tests.helpers.vision_language import PATCHES, SIZE, make_clip
from tests.planning.test_activations import adapter, bytes_kept
from xtuner.model import InternVL_V1_5, LLaVAModel
from xtuner.model.backends.cpu import fused_layers
from xtuner.model.meta_model import build_meta_model, make_model
from xtuner.model.transformers_models.auto import AutoModel
from xtuner.planning import plan, stand_ins
from xtuner.planning.activations import trace_image
from xtuner.planning.settings import RunSettings, Sharding


@pytest.fixture(autouse=True)
def without_cpu_kernels(monkeypatch):
    """The plan is of a GPU; the functions of a CPU keep less."""
    monkeypatch.setattr(fused_layers, "_compute_dtype", lambda x: None)


def settings(length):
    return RunSettings(
        batch_size=1, sequences=1, length=length, accumulative_counts=1, epochs=1.0, iters=None,
        optimizer="AdamW", dtype="float32", checkpointing=None, save_interval=None, kept=None,
        sharding=Sharding(),
    )  # fmt: skip


def kept_of(model, **inputs):
    """Bytes that autograd keeps of a real model's batch with images, the loss left out."""

    def forward():
        merged = model.with_images(inputs)
        merged.pop("position_ids", None)
        mask = torch.zeros(1, 1, 1, 1)
        body = model.causal_lm.base_model
        embedded = merged["inputs_embeds"]
        return body(inputs_embeds=embedded, attention_mask=mask, use_cache=False).last_hidden_state

    return bytes_kept(model, forward)


def llava(device, **parts):
    with torch.device(device):
        return LLaVAModel(
            llm=make_architecture("llama", attention=stand_ins.NAME),
            visual_encoder=make_clip(attn_implementation=stand_ins.NAME),
            use_activation_checkpointing=False,
            **parts,
        )


@pytest.mark.parametrize(
    "parts",
    [
        dict(freeze_llm=True, freeze_visual_encoder=True),
        slow(dict(freeze_llm=True, visual_encoder_lora=True)),
        slow(dict(llm_lora=True, freeze_visual_encoder=True)),
        slow(dict(llm_lora=True, visual_encoder_lora=True)),
        dict(),
    ],
    ids=str,
)
def test_llava_keeps_as_a_real_one(parts):
    """Its rows have one image, and are longer by its patches than those of the dataset."""
    stand_ins.register()
    parts = {name: LoraConfig(r=4) if "lora" in name else value for name, value in parts.items()}
    model = llava("cpu", **parts)
    for length in (4, 24, 64):
        ids = torch.full((1, length), 5)
        ids[0, 1] = -200
        real = kept_of(model, input_ids=ids, pixel_values=torch.zeros(1, 3, SIZE, SIZE))
        empty = llava("meta", **parts)
        found = plan._trace(empty, empty.causal_lm, settings(length))
        assert found.images == "counted" and plan._more_tokens(empty) == PATCHES - 1
        kept = found.activations.kept(None)
        assert kept == pytest.approx(real, rel=0.1), (length, kept, real)


@pytest.mark.parametrize("kind", ["internlm2", slow("phi3")])
def test_internvl_keeps_as_a_real_one(kind, tmp_path):
    """A plan reads its ``config.json`` and tokenizer alone."""
    stand_ins.register()
    folder = save_internvl(tmp_path / "model", kind)
    section = dict(
        type=InternVL_V1_5,
        model_path=str(folder),
        llm_lora=adapter(),
        use_activation_checkpointing=False,
    )

    def load(path, **words):
        words["attn_implementation"] = stand_ins.NAME
        return AutoModel.from_pretrained(path, **words | {"dtype": torch.float32})

    def make(owner, config, trusted, loading):
        words = {"attn_implementation": stand_ins.NAME, "dtype": torch.float32}
        return make_model(owner, config, trusted, words)

    model = InternVL_V1_5(**{k: v for k, v in section.items() if k != "type"}, loader=load)
    (folder / "model.safetensors").unlink()
    for count in (2, 8):
        ids = torch.full((1, 4 * count), model.context_id)
        real = kept_of(model, input_ids=ids, pixel_values=torch.zeros(count, 3, 32, 32))
        empty = build_meta_model(section, make)
        found = plan._trace(empty, empty.causal_lm, settings(4 * count))
        assert found.images == "counted" and plan._more_tokens(empty) == 0
        kept = found.activations.kept(None)
        assert kept == pytest.approx(real, rel=0.1), (count, kept, real)


class Masked(nn.Module):
    """Takes rows out by a mask, as Gemma 4 does with patches that fill the batch."""

    def __init__(self, by_weight):
        super().__init__()
        self.layer, self.by_weight = nn.Linear(4, 4, device="meta"), by_weight

    def forward(self, rows):
        seen = self.layer(rows)
        return seen[(seen if self.by_weight else rows).sum(1) > 0] ** 2


def test_masks_whose_values_are_known():
    rows = torch.tensor([[1.0] * 4, [-1.0] * 4, [2.0] * 4])
    known, unknown = Masked(False), Masked(True)
    found = trace_image(known, lambda: known(rows), autocast=torch.float32)
    # the rows, the two that stay, and the mask
    assert found is not None and found.outside == 3 * 4 * 4 + 2 * 4 * 4 + 3
    assert trace_image(unknown, lambda: unknown(rows), autocast=torch.float32) is None
