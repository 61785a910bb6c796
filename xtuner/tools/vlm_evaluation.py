"""What ``mmbench`` and ``eval_refcoco`` share: arguments, the model, distributed questions."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner.tools.arguments import (
    add_bot_name,
    add_launcher,
    add_max_new_tokens,
    add_model_settings,
    add_stop_words,
    add_trust_remote_code,
    add_visual_select_layer,
)
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr
from xtuner.utils.templates import PROMPT_TEMPLATE

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel

    from xtuner.chat.prompt import ChatPrompt
    from xtuner.chat.session import ChatSession
    from xtuner.utils.types import Tokenizer


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of both commands."""
    parser.add_argument(
        "model_name_or_path",
        help=tr("a vision-language model, or LLaVA's language model: folder or hub name"),
    )
    parser.add_argument("--adapter", help=tr("an adapter's folder"))
    parser.add_argument("--data-path", required=True, help=tr("the questions"))
    parser.add_argument("--work-dir", help=tr("where the results go"))
    parser.add_argument("--llava", help=tr("a LLaVA model's folder"))
    parser.add_argument("--visual-encoder", help=tr("the visual encoder of LLaVA"))
    add_visual_select_layer(parser)
    parser.add_argument(
        "--prompt-template",
        choices=sorted(name for name in PROMPT_TEMPLATE if name != "auto"),
        metavar="NAME",
        help=tr("the prompt template of a LLaVA's training"),
    )
    add_stop_words(parser)
    add_model_settings(parser)
    add_bot_name(parser)
    add_max_new_tokens(parser, 100)
    parser.add_argument("--seed", type=int, default=0, help=tr("random seed"))
    add_trust_remote_code(parser)
    add_launcher(parser)


def begin(args: argparse.Namespace, command: str) -> None:
    """Start torchrun where the environment asks for it, and initialize the process group."""
    from xtuner.engine.launch import start_processes

    start_processes(args.launcher, [command, *args.argv])
    import torch

    from xtuner.parallel.processes import init_distributed

    if args.launcher != "none":
        init_distributed(args.launcher, "nccl" if torch.cuda.is_available() else "gloo")
    torch.manual_seed(args.seed)


def load_session(args: argparse.Namespace) -> ChatSession:
    """The model as a chat session with greedy decoding.

    Raises:
        UserError: when the model takes no images, or a LLaVA comes without its template.
    """
    from xtuner.chat.session import ChatSession, Sampling
    from xtuner.tools.chat_loading import (
        image_text_prompt,
        is_image_text,
        llava_adapter,
        load_for_chat,
        locate,
    )

    folder, adapter = locate(args.model_name_or_path, args.adapter or llava_adapter(args.llava))
    if args.llava is None and not is_image_text(folder):
        raise UserError(
            tr("this model takes no images."),
            hint=tr("give a vision-language model, or the folder of a LLaVA with --llava."),
            where=Where(str(folder)),
        )
    if args.llava and not args.prompt_template:
        raise UserError(
            tr("a LLaVA needs the template of its training."), hint="--prompt-template vicuna"
        )
    model, tokenizer = load_for_chat(
        folder,
        adapter,
        dtype=args.torch_dtype,
        bits=args.bits,
        offload_folder=args.offload_folder,
        trust_remote_code=args.trust_remote_code,
    )
    stop_words = list(args.stop_words)
    if args.llava:
        model, prompt = _llava(args, model, tokenizer, stop_words)
    else:
        make = image_text_prompt(folder, adapter, trust_remote_code=args.trust_remote_code)
        prompt = make(tokenizer, None, stop_words)
    sampling = Sampling(max_new_tokens=args.max_new_tokens, temperature=0)
    return ChatSession(model, prompt, sampling=sampling)


def _llava(
    args: argparse.Namespace, llm: PreTrainedModel, tokenizer: Tokenizer, stop_words: list[str]
) -> tuple[Any, ChatPrompt]:
    """A LLaVA model and its prompts."""
    from xtuner.chat.vision_language import ImagePrompt, build_vision_language_model

    model = build_vision_language_model(
        llm,
        Path(args.llava),
        args.visual_encoder,
        args.visual_select_layer,
        trust_remote_code=args.trust_remote_code,
    )
    return model, ImagePrompt(tokenizer, PROMPT_TEMPLATE[args.prompt_template], stop_words)


def answer(session: ChatSession, image: Image, question: str) -> str:
    """Answer a question about an image, without history."""
    session.reset()
    session.attach(image)
    return str(session.ask(question))


def answer_all(count: int, one: Callable[[int], Any], what: str) -> list[Any] | None:
    """Answer questions, distributed over the processes.

    Args:
        count: how many.
        one: returns the result of a question by its number.
        what: description of the progress bar.

    Returns:
        All results in order in the first process, None in the others.
    """
    from mmengine.dist import all_gather_object, get_rank, get_world_size
    from rich.progress import track

    mine = range(get_rank(), count, get_world_size())
    shown = track(mine, description=what, disable=get_rank() != 0)
    results = {number: one(number) for number in shown}
    gathered: dict[int, Any] = {}
    for part in all_gather_object(results):
        gathered.update(part)
    return [gathered[number] for number in range(count)] if get_rank() == 0 else None


def work_dir_of(args: argparse.Namespace, command: str) -> Path:
    """The folder of the results, made."""
    folder = Path(args.work_dir or f"work_dirs/{command}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(tr("the work dir cannot be written to: {error}", error=error)) from error
    return folder


def leave() -> None:
    """Destroy the process group."""
    from xtuner.parallel.processes import shutdown_distributed

    shutdown_distributed()


def print_table(title: str, found: dict[str, float], columns: Sequence[str]) -> None:
    """Print fractions as percentages."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=title)
    for name, share in found.items():
        table.add_row(name, f"{100 * share:.1f}")
    Console().print(table)
