"""The folders that a LLaVA model is written to: ours, Hugging Face's and the LLaVA project's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xtuner.model.lora.merge import merged_copy
from xtuner.model.modules.saving import save_weights
from xtuner.utils.constants import DEFAULT_IMAGE_TOKEN
from xtuner.utils.errors import UserError
from xtuner.utils.files import written_aside
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from xtuner.utils.types import ImageProcessor, Tokenizer

Writer = Callable[[Any, Path, "torch.dtype | None", "int | str"], None]


def write_xtuner(
    model: Any, folder: Path, dtype: torch.dtype | None, max_shard_size: int | str
) -> None:
    """What was trained, each part in a folder of its own; a trained language model at the top."""
    with written_aside(folder) as aside:
        aside.mkdir(parents=True, exist_ok=True)
        _save(model.projector, aside / "projector", dtype, max_shard_size)
        if model.has_adapter:
            _save(model.llm, aside / "llm_adapter", dtype, max_shard_size)
        elif not model.freeze_llm:
            _save(model.llm, aside, dtype, max_shard_size)
        if hasattr(model.visual_encoder, "peft_config"):
            _save(model.visual_encoder, aside / "visual_encoder_adapter", dtype, max_shard_size)
        elif not model.freeze_visual_encoder:
            _save(model.visual_encoder, aside / "visual_encoder", dtype, max_shard_size)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(aside)


def _save(part: Any, folder: Path, dtype: torch.dtype | None, max_shard_size: int | str) -> None:
    weights = part.state_dict()
    if hasattr(part, "peft_config"):
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        part.peft_config[part.active_adapter].save_pretrained(str(folder))
        trained = get_peft_model_state_dict(part)
        # A converter's model has no values where nothing was trained: behind the selected layer.
        plain = {k: _cast(v, dtype) for k, v in trained.items() if not v.is_meta}
        save_file(plain, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        return
    weights = {name: _cast(value, dtype) for name, value in weights.items()}
    save_weights(part, folder, weights, dtype, max_shard_size)


def _cast(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    value = value.detach()
    if dtype is not None and value.is_floating_point():
        value = value.to(dtype)
    return value.contiguous()


def write_huggingface(
    model: Any, folder: Path, dtype: torch.dtype | None, max_shard_size: int | str
) -> None:
    """``LlavaForConditionalGeneration``: same logits, adapters merged."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    if model.projector.config.depth != 2:
        raise UserError(tr("Hugging Face's LLaVA has projectors of depth 2 only"))
    llm, encoder = merged_copy(model.llm, dtype), merged_copy(model.visual_encoder, dtype)
    vision = getattr(encoder.config, "vision_config", encoder.config)
    image_token = _image_token(model, llm)
    config = LlavaConfig(
        text_config=llm.config,
        vision_config=vision,
        image_token_index=image_token,
        projector_hidden_act=model.projector.config.hidden_act,
        vision_feature_layer=model.visual_select_layer,
        vision_feature_select_strategy="default" if model.drops_class_token else "full",
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        tie_word_embeddings=bool(getattr(llm.config, "tie_word_embeddings", False)),
    )
    with torch.device("meta"):
        whole: Any = LlavaForConditionalGeneration(config)
    parts = [
        (whole.model.vision_tower, _inner_state(encoder, whole.model.vision_tower)),
        (whole.model.multi_modal_projector, _projector_state(model.projector)),
        (whole.model.language_model, llm.base_model.state_dict()),
        (whole.lm_head, llm.get_output_embeddings().state_dict()),
    ]
    for part, weights in parts:
        part.load_state_dict({k: _cast(v, dtype) for k, v in weights.items()}, assign=True)
    rows = llm.get_input_embeddings().weight.shape[0]
    if image_token >= rows:
        _grow(whole, image_token + 1 - rows)
    with written_aside(folder) as aside:
        whole.save_pretrained(aside, max_shard_size=max_shard_size)
        if model.tokenizer is not None:
            model.tokenizer.add_tokens([DEFAULT_IMAGE_TOKEN], special_tokens=True)
            model.tokenizer.save_pretrained(aside)


def save_processor(
    image_processor: ImageProcessor,
    tokenizer: Tokenizer,
    config: PreTrainedConfig,
    folder: Path,
    *,
    square: bool,
) -> None:
    """Write the ``LlavaProcessor`` that goes with a model in Hugging Face's form.

    Args:
        image_processor: of the visual encoder.
        tokenizer: with ``<image>``.
        config: the model's ``LlavaConfig``.
        folder: where it goes.
        square: images are padded to squares, as in training.
    """
    from transformers import LlavaProcessor

    if square:
        image_processor = _padding_processor(image_processor)
    drops = config.vision_feature_select_strategy == "default"
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(drops),  # the class token, which is dropped again
        chat_template=tokenizer.chat_template,
    )
    processor.save_pretrained(folder)


def _padding_processor(image_processor: Any) -> Any:
    """The same image processor as one that makes images square first."""
    import transformers

    settings = image_processor.to_dict()
    settings.pop("image_processor_type", None)
    settings.setdefault("do_center_crop", False)  # Llava's own is True
    plain = type(image_processor).__name__.endswith("Pil")
    kind = getattr(transformers, "LlavaImageProcessor" + ("Pil" if plain else ""))
    return kind(**{**settings, "do_pad": True})


def _image_token(model: Any, llm: Any) -> int:
    """The id of ``<image>``: the tokenizer's own, or the next free one."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        return int(llm.get_input_embeddings().weight.shape[0])
    known = tokenizer.get_vocab().get(DEFAULT_IMAGE_TOKEN)
    return int(len(tokenizer) if known is None else known)


def _grow(whole: Any, count: int) -> None:
    """Rows for tokens that the language model does not have; nothing ever predicts them."""
    for layer in (whole.get_input_embeddings(), whole.get_output_embeddings()):
        new = layer.weight.new_zeros(count, layer.weight.shape[1])
        layer.weight = torch.nn.Parameter(torch.cat([layer.weight.detach(), new]))
    whole.config.text_config.vocab_size = whole.get_input_embeddings().weight.shape[0]


def _inner_state(encoder: Any, target: Any) -> dict[str, Tensor]:
    """The weights of a visual encoder under the names of ``target``, which may nest them."""
    weights: dict[str, Tensor] = encoder.state_dict()
    wanted = set(target.state_dict())
    if set(weights) == wanted:
        return weights
    for prefix in ("vision_model.",):
        if {f"{prefix}{name}" for name in weights} >= wanted:
            return {f"{prefix}{name}": value for name, value in weights.items()}
        if {name.removeprefix(prefix) for name in weights} >= wanted:
            return {name.removeprefix(prefix): value for name, value in weights.items()}
    raise UserError(
        tr(
            "{encoder_type} has no counterpart in Hugging Face's LLaVA",
            encoder_type=type(encoder).__name__,
        )
    )


def _projector_state(projector: Any) -> dict[str, Tensor]:
    state = projector.model.state_dict()
    return {
        f"linear_{2 if name.startswith('2') else 1}.{name.partition('.')[2]}": value
        for name, value in state.items()
    }


def write_official(
    model: Any, folder: Path, dtype: torch.dtype | None, max_shard_size: int | str
) -> None:
    """The LLaVA project's ``LlavaLlamaForCausalLM``: a Llama with ``model.mm_projector``."""
    llm = merged_copy(model.llm, dtype)
    if llm.config.model_type != "llama":
        raise UserError(
            tr(
                "the LLaVA project has no form for {model_type} models",
                model_type=llm.config.model_type,
            ),
            hint="--save-format huggingface",
        )
    vision = getattr(model.visual_encoder.config, "vision_config", model.visual_encoder.config)
    weights = {name: _cast(value, dtype) for name, value in llm.state_dict().items()}
    weights |= {
        f"model.mm_projector.{name}": _cast(value, dtype)
        for name, value in model.projector.model.state_dict().items()
    }
    trained = not model.freeze_visual_encoder or hasattr(model.visual_encoder, "peft_config")
    tower = "visual_encoder" if trained else getattr(model.visual_encoder, "name_or_path", "")
    with written_aside(folder) as aside:
        aside.mkdir(parents=True)
        _write_shards(weights, aside, max_shard_size)
        settings = llm.config.to_dict() | {
            "model_type": "llava_llama",
            "architectures": ["LlavaLlamaForCausalLM"],
            "mm_vision_tower": tower,
            "mm_hidden_size": vision.hidden_size,
            "mm_projector_type": f"mlp{model.projector.config.depth}x_gelu",
            "mm_vision_select_layer": model.visual_select_layer,
            "mm_vision_select_feature": "patch",
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "image_aspect_ratio": "pad",
            "use_mm_proj": True,
        }
        (aside / "config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
        if trained:
            _save(
                merged_copy(model.visual_encoder, dtype),
                aside / "visual_encoder",
                dtype,
                max_shard_size,
            )
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(aside)


def _write_shards(weights: dict[str, Tensor], folder: Path, max_shard_size: int | str) -> None:
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(weights, folder, max_shard_size=max_shard_size)


FORMATS: dict[str, Writer] = {
    "xtuner": write_xtuner,
    "huggingface": write_huggingface,
    "official": write_official,
}
