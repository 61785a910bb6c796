"""A config for any model folder and rows of one's own, for ``xtuner copy-cfg --model``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from xtuner.configs.cards import ModelCard
from xtuner.configs.custom import (
    Rows,
    card_of,
    dataset_of,
    own_card,
    render_for,
    render_own,
)
from xtuner.configs.models.deepseek import FP8
from xtuner.configs.names import why_unsupported
from xtuner.configs.settings import METHODS
from xtuner.tools.config_writers.own_images import has_images, image_rows
from xtuner.utils.errors import UserError, Where
from xtuner.utils.hub import require_available
from xtuner.utils.lang import tr, translate

QUESTIONS = ("question", "prompt", "query", "instruction", "input", "q")
ANSWERS = ("answer", "response", "completion", "output", "reply", "a")
REJECTED = ("rejected", "rejected_response", "rejected_messages")
"""Columns of pairs of answers: of TRL and LLaMA-Factory, of ms-swift."""
SPARE_TOKENS = (
    *("<|reward|>", "[UNUSED_TOKEN_130]", "<|reserved_special_token_0|>", "<|fim_pad|>"),
    *("<unused0>", "<|extra_0|>"),
)
"""Tokens of InternLM2, Llama 3, Qwen and Gemma that no text has."""
MAX_LENGTH = 2048


def write_own_config(
    model: str, method: str, data: list[str], dataset: str | None
) -> tuple[str, str]:
    """The name and the text of a config.

    Args:
        model: a folder or a name on the hub.
        method: of ``copy_cfg.METHODS``.
        data: files of the user's rows; empty for ``dataset``.
        dataset: a dataset of the catalogue.

    Raises:
        UserError: when the model cannot be trained, or the rows cannot be read, with the reason.
    """
    card = _card(model)
    title = re.sub(r"\W+", "_", Path(model).name).strip("_").lower() or "model"
    if dataset is not None:
        known = dataset_of(dataset)
        if known is None:
            raise UserError(
                tr("there is no dataset {name!r} for this", name=dataset),
                hint=tr("'xtuner list-cfg --long' shows the datasets; --data takes your own file."),
            )
        name = f"{title}_{method}_{dataset}"
        if METHODS[method].kind != "sft":
            raise UserError(
                tr("{method} learns from pairs of answers: give yours with --data.", method=method)
            )
        _require_supported(card, method, model)
        return name, render_for(card, method, known, name)
    rows = read_own_rows(data)
    if rows.image_folder is not None and card.kind != "vision":
        _refuse_images(card, rows)
    if rows.pairs and not card.chat:
        raise UserError(
            tr("the tokenizer has no chat template"),
            hint=tr(
                "preferences are written with it: start from a chat model, or from one that "
                "'xtuner convert' wrote."
            ),
            where=Where(model),
        )
    method = _method_for(rows, method)
    _require_supported(card, method, model)
    if METHODS[method].kind == "reward":
        card = _with_reward_token(card, model, with_images=rows.image_folder is not None)
    stem = re.sub(r"\W+", "_", Path(rows.files[0]).name.partition(".")[0]).strip("_") or "data"
    name = f"{title}_{method}_{stem}"
    return name, render_own(card, method, rows, name)


def _refuse_images(card: ModelCard, rows: Rows) -> None:
    """Say why a model is not trained on images.

    Raises:
        UserError: always.
    """
    from transformers import PreTrainedConfig

    from xtuner.tokenization.processor import load_processor

    if "vision_config" in PreTrainedConfig.get_config_dict(card.path)[0]:
        load_processor(card.path)  # which says what is missing
        raise UserError(
            tr("the processor has no chat template, with which rows with images are written."),
            hint=tr("start from a model that answers questions."),
            where=Where(card.path),
        )
    raise UserError(
        tr("the rows have images, and this model takes none."),
        hint=tr("'xtuner list-cfg --dataset custom_vision' shows models that do."),
        where=Where(rows.files[0]),
    )


def _method_for(rows: Rows, method: str) -> str:
    """The method for these rows: DPO for pairs of answers unless another one is asked for.

    Raises:
        UserError: for a method that learns from pairs, and rows that are none.
    """
    kind = METHODS[method].kind
    if rows.pairs and kind == "sft":
        return f"dpo_{method}"
    if kind != "sft" and not rows.pairs:
        raise UserError(
            tr("{method} learns from pairs of answers, and these rows are none.", method=method),
            hint=tr('a row: {"prompt": ..., "chosen": ..., "rejected": ...}'),
            where=Where(rows.files[0]),
        )
    return method


def _with_reward_token(card: ModelCard, model: str, *, with_images: bool) -> ModelCard:
    """A card that names the token at which a reward is read: a spare one, or the end of a text.

    Raises:
        UserError: when the model cannot become a reward model.
    """
    from xtuner.model.reward_classes import require_image_classifier
    from xtuner.model.transformers_models.auto import AutoConfig, AutoTokenizer

    if with_images:
        require_image_classifier(AutoConfig.from_pretrained(card.path, trust_remote_code=False))
    if "reward_token_id" in card.settings:
        return card
    tokenizer = AutoTokenizer.from_pretrained(card.path, trust_remote_code=False)
    known = tokenizer.get_vocab()
    spare = [known[name] for name in SPARE_TOKENS if name in known]
    token = spare[0] if spare else tokenizer.eos_token_id
    if token is None or token == tokenizer.pad_token_id:  # which classifiers look before
        raise UserError(
            tr("the tokenizer has no token at which a reward could be read."),
            hint=tr(
                "copy a config with --method orpo_lora, or set eos_token and pad_token to two "
                "tokens in tokenizer_config.json."
            ),
            where=Where(model),
        )
    return replace(card, settings={**card.settings, "reward_token_id": token})


def _require_supported(card: ModelCard, method: str, model: str) -> None:
    """Refuse what the catalogue says of a model."""
    reason = why_unsupported(card, method)
    if reason is not None:
        raise UserError(
            tr(
                "{name} cannot be trained by {method}: {reason}",
                name=card.title,
                method=method,
                reason=translate(reason),
            ),
            where=Where(model),
        )


def _card(model: str) -> Any:
    """The card of a model: the catalogue's where it knows it, else what the folder says."""
    from transformers import PreTrainedConfig

    from xtuner.model.transformers_models.auto import AutoConfig, AutoModelForCausalLM

    folder = Path(model).expanduser()
    path = str(folder.resolve()) if folder.is_dir() else model
    require_available(path, Where(key="--model"))
    known = card_of(model)
    if known is not None and folder.is_dir():
        # what the card says of the hub's weights need not hold of these
        _require_plain(PreTrainedConfig.get_config_dict(path)[0], model)
        left = {method: why for method, why in known.unsupported.items() if why != FP8}
        return replace(known, path=path, unsupported=left)
    if known is not None:
        return replace(known, path=path)
    _require_known_class(path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            tr("its config.json cannot be used: {error}", error=str(error).splitlines()[0]),
            hint=tr(
                "give a Hugging Face model folder (config.json, tokenizer, weights) or a hub id."
            ),
            where=Where(model),
        ) from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(
            tr("{kind} is no language model that XTuner can train", kind=config.model_type),
            hint=tr("'xtuner list-cfg' shows the models, those for images too."),
            where=Where(model),
        )
    _require_plain(config.to_dict(), model)
    text = config.get_text_config()
    length = min(MAX_LENGTH, getattr(text, "max_position_embeddings", None) or MAX_LENGTH)
    settings = {"max_length": length} if length != MAX_LENGTH else {}
    with_images = "vision_config" in config.to_dict() and _has_processor(path)
    return own_card(
        path,
        model,
        settings,
        chat_template=with_images or _has_chat_template(path, model),
        kind="vision" if with_images else "text",
    )


def _require_plain(config: Mapping[str, Any], model: str) -> None:
    if config.get("quantization_config") is not None:
        raise UserError(
            tr("the weights are quantised: an adapter cannot be merged into them"),
            hint=tr("give the model in 16 bits; --method qlora quantises it while loading."),
            where=Where(model),
        )


def _require_known_class(path: str) -> None:
    """Refuse a model whose class only code of its folder knows; that code is not run."""
    from xtuner.model.remote_code import resolve_trust
    from xtuner.model.transformers_models.auto import AutoModelForCausalLM, AutoTokenizer

    for loader in (AutoModelForCausalLM, AutoTokenizer):
        try:
            resolve_trust(loader, path, trusted=False)
        except UserError as error:
            error.hint = tr(
                "this command runs no code of a model. Copy a config of a similar one ('xtuner "
                "list-cfg') and, if you trust the code, set trust_remote_code=True in it."
            )
            raise


def _has_processor(path: str) -> bool:
    """Whether a model has a processor of images with a chat template."""
    from xtuner.tokenization.processor import load_processor

    try:
        return bool(load_processor(path).chat_template)
    except UserError:
        return False


def _has_chat_template(path: str, model: str) -> bool:
    from xtuner.model.transformers_models.auto import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            tr("its tokenizer cannot be loaded: {error}", error=str(error).splitlines()[0]),
            hint=tr(
                "the folder needs tokenizer.json or tokenizer.model, and tokenizer_config.json."
            ),
            where=Where(model),
        ) from error
    return bool(tokenizer.chat_template)


def read_own_rows(data: list[str]) -> Rows:
    """Read rows of one's own and find out how a row is to be read.

    Raises:
        UserError: when a row cannot be read, or no layout fits, with the fields that there are.
    """
    from xtuner.dataset.reading import find_files, require_rows

    files = find_files(data)
    rows = [row for file in files for row in require_rows(file)]
    if not rows:
        raise UserError(tr("there are no rows"), where=Where(files[0]))
    for row in rows:
        if not isinstance(row.value, dict):
            raise UserError(tr("a row is a JSON object"), where=Where(row.file, row.line))
    values = [row.value for row in rows]
    loader, load = _loader(files)
    pairs = any(value.get(name) is not None for value in values for name in REJECTED)
    if any(has_images(value, "chosen" if pairs else "") for value in values):
        return replace(image_rows(files, rows, pairs), loader=loader, load=load)
    if pairs:
        return _pairs(files, rows, loader)
    map_fn, fields = _reader(values)
    if map_fn == "auto_map_fn" and fields is None:
        _require_readable(rows)
    characters = sum(len(str(value)) for value in values)
    questions = tuple(_questions(values, map_fn, fields))
    absolute = tuple(str(Path(file).resolve()) for file in files)
    return Rows(
        absolute, len(rows), characters, map_fn, fields, questions, loader=loader, load=load
    )


def _pairs(files: Sequence[str], rows: Sequence[Any], loader: str) -> Rows:
    """What is known of pairs of answers without images."""
    from xtuner.dataset.preference_dataset import messages_of_pair

    if loader != "json":
        raise UserError(
            tr("pairs of answers are read from JSON lines"),
            hint=tr("convert them to one format, for example JSON lines."),
            where=Where(files[0]),
        )
    prompts = []
    for row in rows:
        try:
            prompts.append(messages_of_pair(row.value)[0])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                tr("this row is no pair of answers ({error})", error=error),
                hint=tr('a row: {"prompt": ..., "chosen": ..., "rejected": ...}'),
                where=Where(row.file, row.line),
            ) from error
    asked = [str(message["content"]) for prompt in prompts[:2] for message in prompt[-1:]]
    absolute = tuple(str(Path(file).resolve()) for file in files)
    characters = sum(len(str(row.value)) for row in rows)
    return Rows(absolute, len(rows), characters, None, questions=tuple(asked), pairs=True)


def _loader(files: Sequence[str]) -> tuple[str, str]:
    """The ``path`` of ``load_dataset`` that reads these files, and its further argument.

    Raises:
        UserError: when no single loader reads all of them.
    """
    from xtuner.dataset.reading import separator_of
    from xtuner.dataset.sources import loader_of

    found = {}
    for file in files:
        loader = loader_of(file) or "json"
        separator = separator_of(file) if loader == "csv" else ","
        found[loader, f"sep={separator!r}" if separator != "," else ""] = file
    if len(found) > 1:
        raise UserError(
            tr("these files are of different formats: {files}", files=", ".join(found.values())),
            hint=tr("convert them to one format, for example JSON lines."),
        )
    return next(iter(found))


def _reader(values: list[Mapping[str, Any]]) -> tuple[str | None, tuple[str, str] | None]:
    """The function that reads these rows, and the fields of one that has to be written."""
    keys = set.intersection(*(set(value) for value in values))
    if "conversation" in keys:
        return None, None
    if "messages" in keys:
        return "openai_map_fn", None
    if keys == {"text"} and "### Human:" not in str(values[0]["text"]):
        return "pretrain_map_fn", None
    if (
        keys & {"conversations", "text"}
        or keys >= {"instruction", "output"}
        or keys >= {"input", "output"}
    ):
        return "auto_map_fn", None
    question = next((name for name in QUESTIONS if name in keys), None)
    answer = next((name for name in ANSWERS if name in keys), None)
    if question is None or answer is None:
        return "auto_map_fn", None  # which names the row that it cannot read
    return "auto_map_fn", (question, answer)


def _require_readable(rows: list[Any]) -> None:
    from xtuner.dataset.map_fns import auto_map_fn

    for row in rows:
        try:
            auto_map_fn(row.value)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                tr("no known layout fits this row: {error}", error=error),
                hint=tr(
                    "'xtuner list-dataset-format' shows the layouts; docs/en/custom_dataset.md "
                    "shows how to write a map function."
                ),
                where=Where(row.file, row.line),
            ) from error


def _questions(
    values: list[Mapping[str, Any]], map_fn: str | None, fields: tuple[str, str] | None
) -> list[str]:
    """The first questions of two rows, to be asked while training."""
    from xtuner.dataset import map_fns

    if fields is not None:
        return [str(value[fields[0]]) for value in values[:2]]
    read = getattr(map_fns, map_fn) if map_fn else dict
    conversations = [read(value).get("conversation") or [{}] for value in values[:2]]
    return [turns[0]["input"].strip() for turns in conversations if turns[0].get("input")]
