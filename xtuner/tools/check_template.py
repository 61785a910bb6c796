"""``xtuner check-template``: training, the saved tokenizer and chat build the same prompt."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner.proving.templates import PROBES, Conversation, compare, refuse
from xtuner.tools.arguments import add_trust_remote_code
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr, translate
from xtuner.utils.templates import AUTO_TEMPLATE, PROMPT_TEMPLATE
from xtuner.utils.terminal import printable

if TYPE_CHECKING:
    from xtuner.tokenization.template_check import Probe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("config_or_model", help=tr("a config, or a model's folder"))
    parser.add_argument(
        "--prompt-template",
        choices=sorted(PROMPT_TEMPLATE),
        metavar="NAME",
        help=tr("the template of the training; 'auto' is the tokenizer's own chat template"),
    )
    parser.add_argument(
        "--data",
        help=tr(
            "rows of your own to try, too: a JSON or JSON-lines file with 'messages' or "
            "'conversation'"
        ),
    )
    add_trust_remote_code(parser)


def run(args: argparse.Namespace) -> int:
    """Compare; the exit status is 1 when they disagree."""
    training = _training(args.config_or_model, args.prompt_template, args.trust_remote_code)
    data = Path(args.data) if args.data else None
    folder = Path(args.config_or_model)
    saved = _saved_stop_ids(folder) if folder.is_dir() else None
    if training.template is None:
        _run_own(training, data, saved, is_export=(folder / "xtuner_config.py").is_file())
        return 0
    conversations = list(PROBES) + (read_conversations(data) if data else [])
    refuse(compare(training.tokenizer, training.template, conversations, saved))
    print(
        tr(
            "{count} conversations: training, the saved tokenizer and chat agree, "
            "and every answer ends where generation stops.",
            count=len(conversations),
        )
    )
    print(
        tr(
            "a named template has no tools and no field for reasoning: rows with them are "
            "refused. <think> blocks in answers are text as any other."
        )
    )
    return 0


def _run_own(
    training: Training, data: Path | None, saved: list[int] | None, is_export: bool
) -> None:
    """Try the tokenizer's own chat template, and report."""
    from xtuner.tokenization.chat_template import answer_stops
    from xtuner.tokenization.template_check import PROBES as OWN_PROBES
    from xtuner.tokenization.template_check import check_own_template

    tokenizer = training.tokenizer
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # a server stops at what an exported folder says; of a base, convert writes the union
    stops = [*(saved or []), *eos] if is_export else [*answer_stops(tokenizer)[0], *(saved or [])]
    checked = check_own_template(
        tokenizer,
        stops,
        [*OWN_PROBES, *(_probes_of(data) if data else [])],
        arguments=training.arguments,
        thinking=training.thinking,
    )
    for feature, reason in checked.unsupported.items():
        name, reason = translate(feature), printable(reason)
        print(
            tr("not supported by this chat template: {name} ({reason})", name=name, reason=reason)
            if reason
            else tr("not supported by this chat template: {name}", name=name)
        )
    refuse(checked.differences)
    supported = ", ".join(map(translate, checked.supported)) or tr("nothing")
    print(tr("besides plain conversations it has: {supported}", supported=supported))
    print(
        tr(
            "{count} conversations: training and serving agree on the tokenizer's own chat "
            "template, and every answer ends where generation stops.",
            count=checked.count,
        )
    )


def _probes_of(file: Path) -> list[Probe]:
    """The rows of a file, with their tools.

    Raises:
        UserError: naming the row that cannot be read.
    """
    from xtuner.dataset.reading import require_rows
    from xtuner.tokenization.messages import messages_of
    from xtuner.tokenization.template_check import Probe

    found = []
    for row in require_rows(str(file)):
        place = str(Where(row.file, row.line))
        try:
            value = row.value
            messages = value.get("messages") or messages_of(value["conversation"])
            found.append(Probe("", messages, tools=value.get("tools"), place=place))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise _no_conversation(row.file, row.line) from error
    return found


def read_conversations(file: Path) -> list[Conversation]:
    """Conversations of a JSON or JSON-lines file, in the layout ``messages`` or ``conversation``.

    Raises:
        UserError: naming the row that cannot be read.
    """
    from xtuner.dataset.reading import require_rows

    found = []
    for row in require_rows(str(file)):
        try:
            found.append(_conversation(row.value))
        except (KeyError, TypeError, IndexError) as error:
            raise _no_conversation(row.file, row.line) from error
    return found


def _no_conversation(file: str, line: int | None) -> UserError:
    return UserError(
        tr("a row with 'messages' (role, content) or 'conversation' (input, output) is expected."),
        where=Where(file, line),
    )


def _conversation(row: Any) -> Conversation:
    if "conversation" in row:
        turns = row["conversation"]
        pairs = [(turn["input"], turn["output"]) for turn in turns]
        return turns[0].get("system") or "", pairs
    messages = row["messages"]
    said = [message for message in messages if message["role"] != "system"]
    system = "\n".join(m["content"] for m in messages if m["role"] == "system")
    contents = [message["content"] for message in said]
    pairs = list(zip(contents[::2], contents[1::2], strict=False))
    if not pairs:
        raise KeyError("messages")
    return system, pairs


@dataclass(frozen=True)
class Training:
    """How a model's training makes text of conversations.

    Attributes:
        tokenizer: with the chat template that is served.
        template: an entry of ``PROMPT_TEMPLATE``; None for the tokenizer's own chat template.
        arguments: the ``template_arguments`` of that one.
        thinking: the ``train_thinking`` of the data.
    """

    tokenizer: Any
    template: Mapping[str, Any] | None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    thinking: str = "keep"


def _training(name: str, template_name: str | None, trusted: bool) -> Training:
    """What a config says, or what a model's folder and the template's name say.

    Raises:
        UserError: when the template is not known.
    """
    folder = Path(name)
    if folder.is_dir() or _is_hub_id(name):  # whose config is read, not run
        from xtuner.export.trained_template import trained_templates
        from xtuner.model.remote_code import load_pretrained
        from xtuner.model.transformers_models.auto import AutoTokenizer

        tokenizer = load_pretrained(AutoTokenizer, name, trusted=trusted)
        template_name = template_name or _template_in(folder / "xtuner_config.py")
        if template_name is None and tokenizer.chat_template:
            template_name = next(iter(trained_templates(tokenizer)), "auto")
        return Training(tokenizer, _named(template_name, name))
    from xtuner.config import load_config
    from xtuner.export.trained_template import (
        set_chat_template,
        template_arguments_of,
        template_of,
        thinking_of,
        uses_own_template,
    )
    from xtuner.registry import BUILDER

    cfg = load_config(name)
    tokenizer = BUILDER.build(cfg.tokenizer)
    template = template_of(cfg) if template_name is None else None
    if template is None and template_name is None and uses_own_template(cfg):
        return Training(tokenizer, None, template_arguments_of(cfg), thinking_of(cfg))
    chosen = template or _named(template_name, name)
    if chosen is not None:
        set_chat_template(tokenizer, chosen)
    return Training(tokenizer, chosen)


def _named(template_name: str | None, place: str) -> Mapping[str, Any] | None:
    """A template by its name; None for the tokenizer's own."""
    if template_name is None:
        raise UserError(
            tr("which prompt template the training used is not known."),
            hint=tr("name it with --prompt-template."),
            where=Where(place),
        )
    template = PROMPT_TEMPLATE[template_name]
    return None if template == AUTO_TEMPLATE else dict(template)


def _is_hub_id(name: str) -> bool:
    """Whether a name is ``OWNER/MODEL`` of the hub: neither a file nor in a folder that is here."""
    is_two_words = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None
    return is_two_words and Path(name).suffix != ".py" and not Path(name).parent.exists()


def _template_in(config: Path) -> str | None:
    """The NAME of ``prompt_template = PROMPT_TEMPLATE.NAME`` in a config file, if it says so."""
    if not config.is_file():
        return None
    found = re.search(
        r"^prompt_template\s*=\s*PROMPT_TEMPLATE\.(\w+)", config.read_text("utf-8"), re.MULTILINE
    )
    return found[1] if found and found[1] in PROMPT_TEMPLATE else None


def _saved_stop_ids(folder: Path) -> list[int] | None:
    file = folder / "generation_config.json"
    if not file.is_file():
        return None
    ids = json.loads(file.read_text("utf-8")).get("eos_token_id")
    return ids if isinstance(ids, list) else [] if ids is None else [ids]
