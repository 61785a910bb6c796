"""Loading a model for chat, with dtype, quantisation and adapter of the command line."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner.export.model_folder import find_model, read_json
from xtuner.utils.dtypes import gpu_has_bf16, torch_dtype
from xtuner.utils.errors import UserError, Where, require
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from xtuner.chat.prompt import ChatPrompt
    from xtuner.dataset.videos import FrameSampling


def locate(name_or_path: str, adapter: str | None = None) -> tuple[Path, Path | None]:
    """Find a model and its adapter before anything heavy is imported.

    Args:
        name_or_path: a model's folder or hub name, or an adapter's folder that names its base.
        adapter: an adapter's folder or hub name.

    Returns:
        The folder of the model, and that of the adapter if there is one.
    """
    name_or_path, adapter = _base_and_adapter(name_or_path, adapter)
    folder = find_model(name_or_path)
    return folder, find_model(adapter, "adapter_config.json") if adapter else None


def has_processor(folder: Path) -> bool:
    """Whether a folder has the files of a processor of images."""
    from xtuner.tokenization.processor import PROCESSOR_FILES

    return any((folder / name).is_file() for name in PROCESSOR_FILES)


def is_image_text(folder: Path) -> bool:
    """Whether a folder is of a vision-language model of transformers with its processor."""
    config = read_json(folder / "config.json")
    sees = "vision_config" in config and config.get("model_type") != "internvl_chat"
    return sees and has_processor(folder)


def image_text_prompt(
    folder: Path,
    adapter: Path | None,
    template_arguments: Mapping[str, Any] | None = None,
    *,
    frames: FrameSampling | None = None,
    trust_remote_code: bool = False,
) -> Callable[..., ChatPrompt]:
    """What makes the prompts of a vision-language model of transformers.

    Args:
        folder: the model's.
        adapter: the adapter's, whose processor is used where it has one.
        template_arguments: given to the chat template.
        frames: which frames of videos are used; as in training by default.
        trust_remote_code: whether code of the folders may run.

    Returns:
        A constructor of ``ChatPrompt``, for the other arguments.
    """
    from xtuner.chat.image_text import ImageTextPrompt
    from xtuner.tokenization.processor import load_processor

    own = adapter if adapter is not None and has_processor(adapter) else folder
    sampling: dict[str, Any] = {} if frames is None else {"frames": frames}
    return functools.partial(
        ImageTextPrompt,
        **sampling,
        processor=load_processor(str(own), trust_remote_code=trust_remote_code),
        template_arguments=dict(template_arguments or {}),
    )


def llava_adapter(llava: str | None) -> str | None:
    """The adapter of the language model in the folder of a LLaVA model, if there is one."""
    if llava is None:
        return None
    if not (Path(llava) / "projector").is_dir():
        raise UserError(
            tr("there is no projector/ in this folder."),
            hint=tr("'xtuner convert pth_to_hf' writes it from a LLaVA checkpoint."),
            where=Where(llava),
        )
    folder = Path(llava) / "llm_adapter"
    return str(folder) if folder.is_dir() else None


def load_for_chat(
    folder: Path,
    adapter_folder: Path | None = None,
    *,
    dtype: str = "auto",
    bits: int | None = None,
    offload_folder: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load a model and its tokenizer, on the GPU where there is one.

    Args:
        folder: the model's folder.
        adapter_folder: the adapter's, if there is one.
        dtype: ``auto`` (the model's own), ``fp16``, ``bf16`` or ``fp32``.
        bits: 4 (NF4, double quantisation) or 8 (int8).
        offload_folder: where weights go that fit neither GPU nor memory.
        trust_remote_code: whether code of the folders may run.

    Returns:
        The model, ready to generate, and the tokenizer: the adapter's own where it has one.
    """
    import torch
    from transformers.utils import logging

    from xtuner.model.loading import require_whole
    from xtuner.model.remote_code import load_pretrained
    from xtuner.model.transformers_models.auto import AutoTokenizer

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    settings: dict[str, Any] = {
        "dtype": dtype if dtype == "auto" else torch_dtype(dtype),
        "device_map": "auto" if torch.cuda.is_available() else "cpu",
    }
    if offload_folder:
        settings["offload_folder"] = offload_folder
    if bits:
        settings["quantization_config"] = _quantisation(bits)
    try:
        model, report = load_pretrained(
            _auto_class(folder, adapter_folder),
            folder,
            trusted=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **settings,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            tr("the model cannot be loaded: {error}", error=str(error).partition("\n\n")[0]),
            where=Where(str(folder)),
        ) from error
    require_whole(report, str(folder))
    # a model of several parts, such as InternVL 1.5, has none of its own
    _require_ids(getattr(model, "generation_config", None), folder)
    has_own = adapter_folder is not None and any(adapter_folder.glob("tokenizer*"))
    place = adapter_folder if has_own and adapter_folder is not None else folder
    tokenizer = load_pretrained(AutoTokenizer, place, trusted=trust_remote_code)
    if adapter_folder is not None:
        model = _with_adapter(model, folder, adapter_folder)
    return model.eval(), tokenizer


def _auto_class(folder: Path, adapter: Path | None) -> Any:
    """The Auto class of a model: the one that sees, unless an adapter is of the other one.

    A folder with vision may be loaded by two classes (Qwen3.5), with and without the encoder.
    """
    from xtuner.export.adapted_class import auto_class_of
    from xtuner.export.streaming_merge import read_adapter
    from xtuner.model.transformers_models.auto import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        model_classes,
    )

    if adapter is not None:
        return auto_class_of(folder, read_adapter(adapter))
    model_type = str(read_json(folder / "config.json").get("model_type"))
    sees = is_image_text(folder) and model_classes(AutoModelForImageTextToText, model_type)
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def _require_ids(settings: object, folder: Path) -> None:
    """Refuse special tokens of a generation config that are no ids.

    Args:
        settings: the model's generation config, read from ``generation_config.json`` or, where
            there is none, from ``config.json``.
        folder: the model's.
    """
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(settings, name, None)
        ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
        if not all(isinstance(each, int) for each in ids):
            files = [folder / "generation_config.json", folder / "config.json"]
            file = next((each for each in files if each.is_file()), folder)
            raise UserError(
                tr(
                    "{name} is {value!r}; a token id or a list of them is expected.",
                    name=name,
                    value=value,
                ),
                where=Where(str(file)),
            )


def _base_and_adapter(name_or_path: str, adapter: str | None) -> tuple[str, str | None]:
    """An adapter's folder given as the model stands for its base with that adapter."""
    folder = Path(name_or_path).expanduser()
    is_adapter = (folder / "adapter_config.json").is_file()
    if adapter or not is_adapter or (folder / "config.json").is_file():
        return name_or_path, adapter
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise UserError(
            tr("this adapter does not name its base model."),
            hint=f"xtuner chat BASE --adapter {shlex.quote(name_or_path)}",
            where=Where(str(folder)),
        )
    return str(base), name_or_path


def _quantisation(bits: int) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    require("bitsandbytes", extra="quant", purpose=f"--bits {bits}")
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    bf16 = not torch.cuda.is_available() or gpu_has_bf16()
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float16,
    )


def _with_adapter(model: PreTrainedModel, base: Path, adapter: Path) -> Any:
    from xtuner.export.fingerprint import FILE_NAME, check_fingerprint
    from xtuner.export.model_folder import read_adapter_config
    from xtuner.export.streaming_merge import read_adapter, resize_embeddings
    from xtuner.export.weights import Weights
    from xtuner.model.lora.adapter_files import load_adapter

    if (adapter / FILE_NAME).is_file():
        check_fingerprint(adapter, Weights(base))
    read_adapter_config(adapter)
    resize_embeddings(model, read_adapter(adapter))
    try:
        return load_adapter(model, adapter)
    except (ValueError, RuntimeError, OSError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()
        raise UserError(
            tr("the adapter does not fit this model: {reason}", reason=" ".join(reason[:2])),
            hint=tr("is this the base that the adapter was trained on?"),
            where=Where(str(adapter)),
        ) from error
