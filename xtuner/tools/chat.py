"""``xtuner chat``: chat with a model in the terminal, or answer the lines of a pipe."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner.tools.arguments import (
    add_bot_name,
    add_max_new_tokens,
    add_model_settings,
    add_stop_words,
    add_trust_remote_code,
    add_visual_select_layer,
)
from xtuner.utils.errors import UserError, Where, require
from xtuner.utils.lang import tr
from xtuner.utils.templates import AUTO_TEMPLATE, PROMPT_TEMPLATE, SYSTEM_TEMPLATE

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from xtuner.chat.prompt import ChatPrompt
    from xtuner.chat.session import ChatSession, Sampling
    from xtuner.chat.vision_language import VisionLanguageModel
    from xtuner.utils.types import Tokenizer

PLUGINS = ("calculate", "solve", "search")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("model_name_or_path", help=tr("a folder or a hub name"))
    _add_images(parser)
    add_model_settings(parser)
    templates = sorted(PROMPT_TEMPLATE)
    parser.add_argument(
        "--prompt-template",
        choices=templates,
        metavar="NAME",
        help=tr(
            "default: auto, the tokenizer's own chat template. One of: {templates}",
            templates=", ".join(templates),
        ),
    )
    parser.add_argument(
        "--template-arguments",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help=tr("for the tokenizer's own chat template, such as enable_thinking=False"),
    )
    system = parser.add_mutually_exclusive_group()
    system.add_argument("--system", help=tr("the system prompt"))
    system.add_argument(
        "--system-template",
        choices=sorted(SYSTEM_TEMPLATE),
        metavar="NAME",
        help=tr("a predefined system prompt: {names}", names=", ".join(sorted(SYSTEM_TEMPLATE))),
    )
    add_bot_name(parser)
    parser.add_argument(
        "--with-plugins",
        nargs="+",
        choices=PLUGINS,
        metavar="PLUGIN",
        help=tr("tools of MOSS models: {names}", names=", ".join(PLUGINS)),
    )
    parser.add_argument(
        "--no-streamer", action="store_true", help=tr("print complete answers, without streaming")
    )
    parser.add_argument(
        "--lagent", action="store_true", help=tr("let the model call tools as a ReAct agent")
    )
    add_stop_words(parser)
    add_trust_remote_code(parser)
    _add_sampling(parser)


def _add_images(parser: argparse.ArgumentParser) -> None:
    extra = parser.add_mutually_exclusive_group()
    extra.add_argument("--adapter", help=tr("an adapter's folder"))
    extra.add_argument("--llava", help=tr("a LLaVA model's folder"))
    parser.add_argument("--visual-encoder", help=tr("the visual encoder of LLaVA"))
    add_visual_select_layer(parser)
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help=tr("an image to ask about; may be given several times"),
    )
    parser.add_argument(
        "--video",
        action="append",
        default=[],
        metavar="FILE",
        help=tr("a video to ask about, or a folder of its frames; may be given several times"),
    )
    parser.add_argument(
        "--video-frames",
        type=int,
        default=16,
        metavar="N",
        help=tr("frames of a video at most (default: 16); as video_frames of the training"),
    )
    parser.add_argument(
        "--video-fps",
        type=float,
        default=2.0,
        metavar="N",
        help=tr("frames per second of a video (default: 2); as video_fps of the training"),
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    add_max_new_tokens(parser, 2048)
    parser.add_argument(
        "--temperature", type=float, default=0.1, help=tr("sampling temperature, 0: greedy")
    )
    parser.add_argument(
        "--top-k", type=int, default=40, help=tr("draw from the k likeliest tokens")
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=0.75,
        help=tr("draw from the likeliest tokens that have this probability together"),
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        help=tr("above 1: tokens that are there already become less likely"),
    )
    parser.add_argument("--seed", type=int, default=0, help=tr("random seed"))


def run(args: argparse.Namespace) -> int:
    """Load the model and chat until ``exit`` or the end of the input."""
    _check(args)
    if args.lagent:
        from xtuner.chat.lagent import run_agent_chat

        return run_agent_chat(args)
    from xtuner.tools.chat_loading import llava_adapter, locate

    folder, adapter = locate(args.model_name_or_path, args.adapter or llava_adapter(args.llava))
    from xtuner.tools.chat_reward import is_reward_model, run_reward_chat

    _check_images(args, folder)
    _notice(tr("loading {model} ...", model=adapter or folder))
    if is_reward_model(folder, adapter):
        if args.video:
            raise UserError(tr("a reward model is shown images alone here."), hint="--image FILE")
        run_reward_chat(
            folder,
            adapter,
            args.torch_dtype,
            images=args.image,
            trust_remote_code=args.trust_remote_code,
        )
        return 0
    import torch

    from xtuner.chat.screen import run_chat

    torch.manual_seed(args.seed)
    answered = run_chat(_session(args, folder, adapter), stream=not args.no_streamer)
    return 0 if answered or sys.stdin.isatty() else 1


def _check(args: argparse.Namespace) -> None:
    """Check for arguments that exclude or need each other, before anything is loaded."""
    if args.prompt_template and PROMPT_TEMPLATE[args.prompt_template] == AUTO_TEMPLATE:
        args.prompt_template = None
    if args.visual_encoder and not args.llava:
        raise UserError(
            tr("--visual-encoder needs --llava."),
            hint="xtuner chat LLM --llava FOLDER --visual-encoder V --image FILE",
        )
    if args.llava and not args.image:
        raise UserError(tr("--llava needs an image."), hint="--image FILE")
    if args.llava and not args.prompt_template:
        raise UserError(
            tr("a chat about images needs a template."),
            hint="--prompt-template vicuna",
        )
    if args.video_frames < 1 or not args.video_fps > 0:
        raise UserError(tr("--video-frames and --video-fps have to be above 0."), status=2)
    if args.with_plugins:
        moss = "moss_sft"
        if args.prompt_template != moss or args.system_template != moss:
            raise UserError(
                tr("plugins work with MOSS models only."),
                hint="--prompt-template moss_sft --system-template moss_sft",
            )
        if "solve" in args.with_plugins:
            require("sympy", extra="all", purpose="--with-plugins solve")


def _check_images(args: argparse.Namespace, folder: Path) -> None:
    """Refuse images and videos that the model would not see."""
    from xtuner.tools.chat_loading import is_image_text

    if not (args.image or args.video):
        return
    if is_image_text(folder) and not args.llava:
        if args.prompt_template:
            raise UserError(
                tr("images and videos go into the model's own chat template."),
                hint=tr("leave --prompt-template out."),
            )
        return
    if args.video:
        raise UserError(
            tr("this model takes no videos."),
            hint=tr("chat with a vision-language model, such as Qwen/Qwen2.5-VL-3B-Instruct."),
            where=Where(str(folder)),
        )
    if not args.llava and not _is_internvl(folder):
        raise UserError(
            tr("this model takes no images."),
            hint=tr(
                "give a vision-language model, or a LLaVA: "
                "xtuner chat LLM --llava FOLDER --visual-encoder V --image FILE"
            ),
            where=Where(str(folder)),
        )
    if len(args.image) > 1:
        raise UserError(tr("LLaVA and InternVL 1.5 take one image."), hint="--image FILE")


def _session(args: argparse.Namespace, folder: Path, adapter: Path | None) -> ChatSession:
    from xtuner.chat.prompt import ChatPrompt
    from xtuner.chat.screen import read_image
    from xtuner.chat.session import ChatSession
    from xtuner.tokenization.chat_template import set_arguments
    from xtuner.tools.arguments import read_arguments
    from xtuner.tools.chat_loading import is_image_text, load_for_chat

    run_tools = None
    if args.with_plugins:
        from xtuner.tools.plugins import make_runner

        run_tools = make_runner(args.with_plugins)
    model, tokenizer = load_for_chat(
        folder,
        adapter,
        dtype=args.torch_dtype,
        bits=args.bits,
        offload_folder=args.offload_folder,
        trust_remote_code=args.trust_remote_code,
    )
    template = PROMPT_TEMPLATE[args.prompt_template] if args.prompt_template else None
    template_arguments = read_arguments(args.template_arguments)
    set_arguments(tokenizer, template_arguments)
    prompt_type: Callable[..., ChatPrompt] = ChatPrompt
    if _is_internvl(folder):
        model, prompt_type = _internvl(model, tokenizer)
    elif args.llava:
        model, prompt_type = _llava(model, args)
    elif template is None and is_image_text(folder):
        _require_seeing(model, args)
        if hasattr(model, "get_image_features"):
            prompt_type = _image_text(folder, adapter, args, template_arguments)
    if template is not None:
        _warn_of_another_template(tokenizer, args.prompt_template)
    prompt = prompt_type(tokenizer, template, args.stop_words)
    _notice(_about(model, prompt))
    if _system(args) and template is not None and "SYSTEM" not in template:
        _notice(
            tr(
                "[the template {prompt_template} has no system prompt: it is ignored]",
                prompt_template=args.prompt_template,
            )
        )
    session = ChatSession(
        model,
        prompt,
        system=_system(args),
        sampling=_sampling(args),
        run_tools=run_tools,
        notice=_notice,
    )
    for file in args.image:
        session.attach(read_image(file, prompt.takes_images), file)
    for file in args.video:
        session.attach(prompt.read_video(file), file)
    return session


def _require_seeing(model: PreTrainedModel, args: argparse.Namespace) -> None:
    """Refuse images where an adapter was trained on the class without the visual encoder."""
    if (args.image or args.video) and not hasattr(model, "get_image_features"):
        raise UserError(
            tr("this adapter is of the language model alone, which takes no images."),
            hint=tr("train it with VisionLanguageFinetune, or leave --image and --video out."),
            where=Where(str(args.adapter or args.model_name_or_path)),
        )


def _sampling(args: argparse.Namespace) -> Sampling:
    from xtuner.chat.session import Sampling

    return Sampling(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
    )


def _warn_of_another_template(tokenizer: Tokenizer, name: str) -> None:
    """Say so when a converted model was trained with another template than is asked for."""
    from xtuner.export.trained_template import trained_templates

    trained = trained_templates(tokenizer)
    if trained and name not in trained:
        _notice(
            tr(
                "[this model was trained with the template {trained}, not with {name}: leave "
                "--prompt-template out]",
                trained=trained[0],
                name=name,
            )
        )


def _is_internvl(folder: Path) -> bool:
    from xtuner.export.model_folder import read_json

    return read_json(folder / "config.json").get("model_type") == "internvl_chat"


def _internvl(whole: nn.Module, tokenizer: Tokenizer) -> tuple[Any, Callable[..., ChatPrompt]]:
    """An InternVL 1.5, and what makes its prompts."""
    from xtuner.chat.internvl import InternVLChat, InternVLPrompt
    from xtuner.dataset.internvl import MARKS

    model = InternVLChat(whole, tokenizer.convert_tokens_to_ids(MARKS[1]))
    return model, functools.partial(InternVLPrompt, chat=model)


def _llava(llm: PreTrainedModel, args: argparse.Namespace) -> tuple[Any, Callable[..., ChatPrompt]]:
    """A LLaVA model, and what makes its prompts."""
    from xtuner.chat.vision_language import ImagePrompt, build_vision_language_model

    model = build_vision_language_model(
        llm,
        Path(args.llava),
        args.visual_encoder,
        args.visual_select_layer,
        trust_remote_code=args.trust_remote_code,
    )
    return model, ImagePrompt


def _image_text(
    folder: Path,
    adapter: Path | None,
    args: argparse.Namespace,
    template_arguments: Mapping[str, Any],
) -> Callable[..., ChatPrompt]:
    """What makes the prompts of a vision-language model; of text alone without its processor."""
    from xtuner.chat.prompt import ChatPrompt
    from xtuner.dataset.videos import FrameSampling
    from xtuner.tools.chat_loading import image_text_prompt

    try:
        return image_text_prompt(
            folder,
            adapter,
            template_arguments,
            frames=FrameSampling(args.video_frames, args.video_fps),
            trust_remote_code=args.trust_remote_code,
        )
    except UserError as error:
        if args.image or args.video:
            raise
        _notice(tr("[text only, no images: {error}]", error=error.message))
        return ChatPrompt


def _system(args: argparse.Namespace) -> str:
    if args.system_template:
        text = str(SYSTEM_TEMPLATE[args.system_template])
        return text.replace("{bot_name}", args.bot_name)
    return args.system or ""


def _about(model: PreTrainedModel | VisionLanguageModel, prompt: ChatPrompt) -> str:
    """One line: device, dtype and which template is used."""
    how = {
        "template": tr("the prompt template of --prompt-template"),
        "tokenizer": tr("the tokenizer's chat template"),
        "raw": tr("no chat template: the text is passed to the model unchanged"),
    }[prompt.kind]
    dtype = str(model.dtype).removeprefix("torch.")
    return f"[{model.device}, {dtype}{tr('; ')}{how}]"


def _notice(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
