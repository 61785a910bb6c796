"""``xtuner convert llava``: a LLaVA model in another form, from ours or from Hugging Face's."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

from xtuner.tools.arguments import (
    add_dtype,
    add_max_shard_size,
    add_trust_remote_code,
    add_visual_select_layer,
)
from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument(
        "source",
        help=tr(
            "what pth_to_hf wrote (a folder with projector/), or a folder of "
            "LlavaForConditionalGeneration"
        ),
    )
    parser.add_argument("out", help=tr("the folder to write"))
    parser.add_argument(
        "--save-format",
        choices=("xtuner", "official", "huggingface"),
        default="huggingface",
        help=tr("layout to write"),
    )
    parser.add_argument(
        "--llm",
        help=tr("the language model, where it is not in the folder"),
    )
    parser.add_argument(
        "--visual-encoder",
        help=tr("the visual encoder, where it is not in the folder"),
    )
    add_visual_select_layer(parser)
    add_dtype(parser, tr("dtype to write (default: as trained)"), "--torch-dtype")
    add_max_shard_size(parser)
    add_trust_remote_code(parser)


def run(args: argparse.Namespace) -> int:
    """Put the parts together and write them."""
    from xtuner.export import llava as llava_format
    from xtuner.export import model_folder
    from xtuner.export.shards import parse_size
    from xtuner.utils.files import written_aside

    source, out = Path(args.source), Path(args.out)
    size = parse_size(args.max_shard_size)
    model_folder.check_output(out, [source])
    whole = _is_whole(source)
    model, tokenizer, image_processor = (_read_whole if whole else _read_parts)(args)
    model.tokenizer = tokenizer
    with written_aside(out) as aside:
        model.to_hf(aside, max_shard_size=size, save_format=args.save_format)
        if args.save_format == "huggingface":
            llava_format.save_with_image_token(image_processor, tokenizer, aside, square=True)
        elif (aside / "visual_encoder").is_dir():
            image_processor.save_pretrained(aside / "visual_encoder")
    print(tr("wrote {out}", out=out))
    return 0


def _is_whole(source: Path) -> bool:
    from xtuner.export.model_folder import read_json

    file = source / "config.json"
    return file.is_file() and read_json(file).get("model_type") == "llava"


def _read_parts(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Model, tokenizer and image processor of our own form."""
    from xtuner.chat.vision_language import build_vision_language_model
    from xtuner.tools.chat_loading import llava_adapter, load_for_chat, locate

    trusted = args.trust_remote_code
    adapter = llava_adapter(args.source)
    if args.llm is None and not (Path(args.source) / "config.json").is_file():
        raise UserError(
            tr("the language model is not in this folder."),
            hint="--llm",
        )
    folder, adapter_folder = locate(args.llm or args.source, adapter)
    llm, tokenizer = load_for_chat(
        folder, adapter_folder, dtype=args.torch_dtype, trust_remote_code=trusted
    )
    seeing = build_vision_language_model(
        llm,
        Path(args.source),
        args.visual_encoder,
        args.visual_select_layer,
        trust_remote_code=trusted,
    )
    seeing.llava.freeze_llm = args.llm is not None
    return seeing.llava, tokenizer, seeing.image_processor


def _read_whole(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Model, tokenizer and image processor of Hugging Face's form."""
    from transformers import AutoImageProcessor

    from xtuner.model.modules.llava_reading import read_huggingface
    from xtuner.model.remote_code import load_pretrained
    from xtuner.model.transformers_models.auto import AutoTokenizer
    from xtuner.utils.dtypes import torch_dtype

    name = args.torch_dtype
    model = read_huggingface(args.source, name if name == "auto" else torch_dtype(name))
    load = functools.partial(
        load_pretrained, name_or_path=args.source, trusted=args.trust_remote_code
    )
    return model, load(AutoTokenizer), load(AutoImageProcessor)
