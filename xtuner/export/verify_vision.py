"""Verification of LLaVA and InternVL models: each weight, and the logits of a question on an image.

What was written is read again. LoRA's products are computed by their definition, not by the code
that merged them.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from xtuner.export.model_folder import read_json
from xtuner.export.streaming_merge import ADAPTER
from xtuner.export.verify import (
    check_tensor,
    check_weights,
    load_with_peft,
    load_with_transformers,
    probe_ids,
    to_fp32,
)
from xtuner.export.verify_streamed import adds_product, lora_product, say_verified
from xtuner.export.weights import Weights
from xtuner.export.write_model import is_adapter
from xtuner.utils.constants import IMAGE_TOKEN_INDEX

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from xtuner.export.trained_weights import TrainedWeights
    from xtuner.model.internvl import InternVL_V1_5
    from xtuner.model.llava import LLaVAModel
    from xtuner.utils.types import Batch

Read: TypeAlias = Callable[[], Tensor]
Part: TypeAlias = "PreTrainedModel | PeftModel"
PROBE_TOKENS = 12
"""Of the text around the probe's image."""


class Files(Mapping[str, Tensor]):
    """The tensors of a folder or file, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._files = Weights(path)

    def __getitem__(self, name: str) -> Tensor:
        return self._files.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files.infos)

    def __len__(self) -> int:
        return len(self._files.infos)


@dataclass
class Expected:
    """The weights that a model, or a part of one, must have when it is read again.

    Attributes:
        weights: name -> what gives the exact weight.
        before: name -> what gives the base's weight, where an adapter adds to it.
        tied: groups of names of one weight; files have one of each.
    """

    weights: dict[str, Read] = field(default_factory=dict)
    before: dict[str, Read] = field(default_factory=dict)
    tied: list[set[str]] = field(default_factory=list)

    def add(self, other: Expected, rename: Callable[[str], str]) -> None:
        """Take over another's weights under other names."""
        self.weights |= {rename(name): read for name, read in other.weights.items()}
        self.before |= {rename(name): read for name, read in other.before.items()}
        self.tied += [{rename(name) for name in group} for group in other.tied]

    def absent(self, names: set[str]) -> set[str]:
        """The weights that are not among names, and not tied to one that is."""
        known = set(names).union(*(group for group in self.tied if group & names))
        return self.weights.keys() - known

    def check(
        self, found: Mapping[str, Tensor], dtype: torch.dtype | None = None, *, grown: bool = False
    ) -> int:
        """Compare with what was read.

        Args:
            found: the weights that were written.
            dtype: that was asked for; sums with an adapter are rounded to their base's when None.
            grown: they may have more rows, of zeros.

        Returns:
            How many there were.

        Raises:
            UserError: naming those that are not the expected ones, rounded.
        """
        wrong = self.absent(set(found)) | (found.keys() - self.weights.keys())
        check_weights(dict.fromkeys(wrong, torch.empty(0)), {}, torch.float32)
        for name in found:
            exact, written = self.weights[name](), found[name]
            if grown and len(written) > len(exact) and not written[len(exact) :].any():
                written = written[: len(exact)]
            before = self.before[name]() if name in self.before else None
            own = None if before is None else dtype or before.dtype
            check_tensor(name, exact, written, before, own)
        return len(found)


def check_parts(model: LLaVAModel, weights: TrainedWeights, folder: Path) -> None:
    """Check the parts of a LLaVA model that were written of a checkpoint.

    Args:
        model: of the config; it needs values only where a part was not trained.
        weights: the checkpoint's.
        folder: with ``projector/`` and the others.

    Raises:
        UserError: naming the weights that are others.
    """
    from peft import get_peft_model_state_dict

    count = 0
    for name, place in _places(model).items():
        part: Any = getattr(model, name)
        own = {
            full.removeprefix(f"{name}."): functools.partial(weights.read, full)
            for full in weights.infos
            if full.startswith(f"{name}.")
        }
        if is_adapter(part):
            trained = {key: read() for key, read in own.items()}
            named = get_peft_model_state_dict(part, state_dict=trained, save_embedding_layers=False)
            expected = Expected({key: _given(tensor) for key, tensor in named.items()})
            count += expected.check(Files(folder / place / "adapter_model.safetensors"))
        else:
            expected = _own(part)
            expected.weights |= own
            count += expected.check(_read(folder / place, part, expected))
    say_verified(count)


def check_merged_llava(
    model: LLaVAModel, folder: Path, save_format: str, dtype: torch.dtype | None
) -> None:
    """Check a LLaVA model in another project's layout against the one in memory.

    Args:
        model: as trained.
        folder: what was written.
        save_format: ``huggingface`` or ``official``.
        dtype: that was asked for.

    Raises:
        UserError: naming the weights that are others.
    """
    llm, encoder = _merged(model.llm), _merged(model.visual_encoder)
    expected = Expected()
    if save_format == "official":
        expected.add(llm, str)
        expected.add(_own(model.projector.model), "model.mm_projector.{}".format)
        count = expected.check(Files(folder), dtype)
        if (folder / "visual_encoder").is_dir():
            part = _plain(model.visual_encoder)
            count += encoder.check(_read(folder / "visual_encoder", part, encoder), dtype)
        say_verified(count)
        return
    from transformers import LlavaForConditionalGeneration

    body = f"{model.causal_lm.base_model_prefix}."
    expected.add(llm, lambda name: _with_prefix(name, body, "language_model."))
    expected.add(encoder, lambda name: f"vision_tower.{name.removeprefix('vision_model.')}")
    expected.add(_own(model.projector.model), _name_of_projector)
    whole: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype="auto")
    found = {
        name.removeprefix("model.").replace("vision_tower.vision_model.", "vision_tower."): tensor
        for name, tensor in whole.state_dict().items()
    }
    say_verified(expected.check(found, dtype, grown=True))


def _with_prefix(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old) if name.startswith(old) else name


def _name_of_projector(name: str) -> str:
    number, _, kind = name.partition(".")
    return f"multi_modal_projector.linear_{2 if number == '2' else 1}.{kind}"


def check_internvl(model: InternVL_V1_5, folder: Path, dtype: torch.dtype | None) -> None:
    """Check an InternVL that was written against the one in memory.

    Args:
        model: as trained.
        folder: what was written.
        dtype: that was asked for.

    Raises:
        UserError: naming the weights that are others.
    """
    expected = Expected()
    expected.add(_merged(model.llm), "language_model.{}".format)
    expected.add(_merged(model.visual_encoder), "vision_model.{}".format)
    expected.add(_own(model.projector), "mlp1.{}".format)
    say_verified(expected.check(_read(folder, model.whole, expected), dtype))


def read_parts(
    model: LLaVAModel, llm: Mapping[str, Any], encoder: PreTrainedModel, folder: Path
) -> LLaVAModel:
    """A LLaVA model of the parts that were written, in fp32 where they are not quantised.

    Args:
        model: of the config, without values: it says what was trained.
        llm: the config of the language model.
        encoder: the visual encoder as its config loads it.
        folder: with the parts.
    """
    from xtuner.model.loading import build_llm
    from xtuner.model.lora.adapter_files import load_adapter

    places = _places(model)
    if "llm" not in places:
        language: Any = build_llm(llm, full=False)
    elif model.has_adapter:
        language = load_with_peft(llm, folder / places["llm"])
    else:
        language = load_with_transformers(folder, auto_class=type(model.llm))
    seeing: Part = encoder
    if "visual_encoder" in places:
        place = folder / places["visual_encoder"]
        if hasattr(model.visual_encoder, "peft_config"):
            seeing = load_adapter(encoder, place, partial=True)
        else:
            seeing = type(encoder).from_pretrained(place, dtype=torch.float32)
    return _assembled(model, language, seeing, folder / "projector")


def read_official(model: LLaVAModel, encoder: PreTrainedModel, folder: Path) -> LLaVAModel:
    """A LLaVA model in the layout of the LLaVA project, which transformers has no class for.

    Args:
        model: as trained.
        encoder: the visual encoder as its config loads it.
        folder: what was written.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = read_json(folder / "config.json") | {"model_type": "llama"}
    files = Files(folder)
    llm = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    name = "model.mm_projector."
    llm.load_state_dict({key: files[key] for key in files if not key.startswith(name)})
    if (folder / "visual_encoder").is_dir():
        encoder = type(encoder).from_pretrained(folder / "visual_encoder", dtype=torch.float32)
    made = _assembled(model, llm, encoder, None)
    projector = {key.removeprefix(name): files[key] for key in files if key.startswith(name)}
    made.projector.model.load_state_dict(projector)
    return made


def _assembled(
    model: LLaVAModel, llm: PreTrainedModel, encoder: Part, projector: Path | None
) -> LLaVAModel:
    from xtuner.model.llava import LLaVAModel
    from xtuner.model.modules.projector import ProjectorModel

    made = LLaVAModel(
        llm,
        encoder,
        freeze_llm=True,
        freeze_visual_encoder=True,
        visual_select_layer=model.visual_select_layer,
        projector_depth=model.projector.config.depth,
        use_activation_checkpointing=False,
    )
    if projector is not None:
        made.projector = ProjectorModel.from_pretrained(projector)
    return made


@torch.no_grad()
def compute_logits(model: LLaVAModel | InternVL_V1_5) -> Tensor:
    """The logits (1, S, V) of a text with an image in it, fp32."""
    batch = probe(model)
    exact(model)
    logits: Tensor = model(batch, mode="tensor").logits
    return logits.float()


@torch.no_grad()
def compute_stock_logits(folder: Path, model: LLaVAModel | InternVL_V1_5) -> Tensor:
    """The logits (1, S, V) of the same text and image by the class of a whole model's folder.

    Args:
        folder: of ``LlavaForConditionalGeneration``, or of an InternVL.
        model: what was written.
    """
    from transformers import LlavaForConditionalGeneration

    from xtuner.model.transformers_models.auto import AutoModel

    batch = probe(model)
    ids = batch["input_ids"]
    if hasattr(model, "context_id"):
        whole: Any = AutoModel.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
        whole.img_context_token_id = model.context_id
    else:
        whole = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        image, count = whole.config.image_token_index, whole.config.image_seq_length
        ids = torch.tensor(
            [[new for old in ids[0].tolist() for new in ([image] * count if old < 0 else [old])]]
        )
    whole.eval()
    logits: Tensor = whole(input_ids=ids, pixel_values=batch["pixel_values"]).logits
    return logits.float()


def probe(model: LLaVAModel | InternVL_V1_5) -> Batch:
    """A text with one image in it: ids (1, S) as the model takes them, and pixels (1, 3, H, W)."""
    from xtuner.model.internvl import InternVL_V1_5, image_size

    text = probe_ids(model.llm.config.get_text_config().vocab_size)[:1, :PROBE_TOKENS]
    if isinstance(model, InternVL_V1_5):
        side, places = image_size(model.whole.config), [model.context_id] * model.encode_blank(0)[1]
        text = text.masked_fill(text == model.context_id, 0)
    else:
        config = model.visual_encoder.config
        side, places = getattr(config, "vision_config", config).image_size, [IMAGE_TOKEN_INDEX]
    half = PROBE_TOKENS // 2
    ids = torch.cat([text[:, :half], torch.tensor([places]), text[:, half:]], 1)
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "pixel_values": pixels}


def exact(model: LLaVAModel | InternVL_V1_5) -> None:
    """Make a model compute in fp32, but for parts that are quantised."""
    for part in (model.llm, model.visual_encoder, model.projector):
        to_fp32(part)
    model.eval()


def _places(model: LLaVAModel) -> dict[str, str]:
    """The parts that are written, and the folder of each."""
    places = {"projector": "projector"}
    if model.has_adapter:
        places["llm"] = "llm_adapter"
    elif not model.freeze_llm:
        places["llm"] = "."
    if hasattr(model.visual_encoder, "peft_config"):
        places["visual_encoder"] = "visual_encoder_adapter"
    elif not model.freeze_visual_encoder:
        places["visual_encoder"] = "visual_encoder"
    return places


def _read(folder: Path, part: PreTrainedModel, expected: Expected) -> Mapping[str, Tensor]:
    """The weights of a folder, by the names that the model's class has for them."""
    files = Files(folder)
    if files.keys() <= expected.weights.keys() and not expected.absent(set(files)):
        return files
    loaded: PreTrainedModel = type(part).from_pretrained(folder, dtype="auto")
    return loaded.state_dict()


def _plain(part: Part) -> PreTrainedModel:
    """The model itself, its layers wrapped where there is an adapter."""
    plain: Any = part.get_base_model() if is_adapter(part) else part
    whole: PreTrainedModel = plain
    return whole


def _own(part: nn.Module) -> Expected:
    """A part's weights as they are."""
    state: dict[str, Tensor] = nn.Module.state_dict(part)
    shared = defaultdict(set)
    for name, tensor in state.items():
        if not tensor.is_meta and tensor.numel():
            shared[tensor.data_ptr(), tensor.shape].add(name)
    tied = [names for names in shared.values() if len(names) > 1]
    return Expected({name: _given(tensor) for name, tensor in state.items()}, tied=tied)


def _merged(part: Part) -> Expected:
    """A part's weights with its adapter merged."""
    if not is_adapter(part):
        return _own(_plain(part))
    layers = dict(part.get_base_model().named_modules())
    if not _is_plain_lora(part, layers):
        from xtuner.model.lora.merge import merged_copy

        return _own(merged_copy(part, torch.float32))
    base, expected = _own(part.get_base_model()), Expected()
    for name, read in base.weights.items():
        if ".lora_" in name or ".original_module." in name:
            continue
        saved = name.replace(f".modules_to_save.{ADAPTER}.", ".")
        merged = saved.replace(".base_layer.", ".")
        expected.weights[merged] = read
        owner, _, kind = merged.rpartition(".")
        if merged != saved and kind == "weight":
            expected.before[merged] = read
            expected.weights[merged] = functools.partial(_sum, read, layers[owner])
    expected.tied = [group for group in base.tied if group <= expected.weights.keys()]
    return expected


def _sum(read: Read, layer: nn.Module) -> Tensor:
    product = lora_product(layer)
    return read() if product is None else read().float() + product


def _is_plain_lora(part: PeftModel, layers: Mapping[str, nn.Module]) -> bool:
    """Whether merging adds a product to weights, and replaces whole modules, and no more."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    config = part.peft_config[ADAPTER]
    for layer in layers.values():
        if isinstance(layer, AuxiliaryTrainingWrapper) and not isinstance(
            layer, ModulesToSaveWrapper
        ):
            return False
        if isinstance(layer, BaseTunerLayer) and not (
            isinstance(layer, LoraLayer)
            and adds_product(config, layer)
            and lora_product(layer) is not None
        ):
            return False
    return getattr(config, "bias", "none") == "none"


def _given(tensor: Tensor) -> Read:
    return lambda: tensor
