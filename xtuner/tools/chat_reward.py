"""``xtuner chat`` with a reward model: question and answer in, the reward of the answer out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner.export.model_folder import read_json
from xtuner.tokenization.rendering import rendered
from xtuner.utils.constants import REWARD_FILE
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from xtuner.dataset.videos import Visual
    from xtuner.utils.types import Tokenizer


def is_reward_model(folder: Path, adapter: Path | None) -> bool:
    """Whether a folder holds a model, or an adapter, with a head for one number."""
    if adapter is not None:
        return read_json(adapter / "adapter_config.json").get("task_type") == "SEQ_CLS"
    names = read_json(folder / "config.json").get("architectures") or [""]
    return str(names[0]).endswith(("ForSequenceClassification", "ForRewardModel"))


def run_reward_chat(
    folder: Path,
    adapter: Path | None,
    dtype: str = "auto",
    *,
    images: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> None:
    """Read question and answer in turns and print rewards, until ``exit`` or the end of the input.

    Args:
        folder: the model's folder.
        adapter: the adapter's, if there is one.
        dtype: as ``--torch-dtype``.
        images: files that all questions are about.
        trust_remote_code: whether code of the folders may run.
    """
    model, tokenizer = _load(folder, adapter, dtype, trust_remote_code)
    file = (adapter or folder) / REWARD_FILE
    token = read_json(file).get("reward_token_id") if file.is_file() else None
    processor, visuals = None, []
    if images:
        from xtuner.chat.screen import read_image
        from xtuner.tokenization.processor import load_processor
        from xtuner.tools.chat_loading import has_processor

        own = adapter if adapter is not None and has_processor(adapter) else folder
        processor = load_processor(own, trust_remote_code)
        visuals = [read_image(each) for each in images]
    shown = sys.stdin.isatty()
    while True:
        question = _read("user: ", shown)
        answer = _read("assistant: ", shown) if question is not None else None
        if question is None or answer is None:
            return
        if not shown:
            print(f"user: {question}\nassistant: {answer}")
        if processor is None:
            reward = score(model, tokenizer, question, answer, token)
        else:
            reward = score_with_images(model, processor, visuals, question, answer, token)
        print(tr("reward: {reward:.3f}", reward=reward), flush=True)


def score(
    model: PreTrainedModel, tokenizer: Tokenizer, question: str, answer: str, token: int | None
) -> float:
    """The reward of an answer.

    Args:
        model: a sequence classifier with one label.
        tokenizer: with the chat template of the training.
        question: of the user.
        answer: of the assistant.
        token: the token that ended each text in training, where the reward is read.
    """
    import torch

    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    text = rendered(tokenizer, messages)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if token is not None:
        ids = [*ids, token]
    # One text without padding: its last token is the one that counts, even if it is the pad token.
    model.config.get_text_config().pad_token_id = None
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids], device=model.device)).logits
    return float(logits[0, 0])


def score_with_images(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    visuals: Sequence[Visual],
    question: str,
    answer: str,
    token: int | None,
) -> float:
    """The reward of an answer about images.

    Args:
        model: as for ``score``.
        processor: of the model.
        visuals: images and videos.
        question: of the user.
        answer: of the assistant.
        token: as for ``score``.
    """
    import torch

    from xtuner.dataset.vision_language.image_prompt import (
        encode_image_prompt,
        text_message,
        user_message,
    )
    from xtuner.dataset.vision_language.placeholders import OF_TEXT

    messages = [user_message(question, visuals), text_message("assistant", answer)]
    inputs = encode_image_prompt(processor, messages, visuals, is_answered=True)
    if token is not None:
        added = {"input_ids": token, "attention_mask": 1}
        for name, value in inputs.items():
            if name in OF_TEXT:
                end = value.new_full((1, 1), added.get(name, 0))
                inputs[name] = torch.cat([value, end], 1)
    model.config.get_text_config().pad_token_id = None  # as for ``score``
    with torch.no_grad():
        logits = model(
            **{
                name: value.to(model.device, model.dtype if value.is_floating_point() else None)
                for name, value in inputs.items()
            }
        ).logits
    return float(logits[0, 0])


def _load(folder: Path, adapter: Path | None, dtype: str, trusted: bool) -> tuple[Any, Any]:
    import torch

    from xtuner.export.verify import quiet_transformers
    from xtuner.model.remote_code import load_pretrained
    from xtuner.model.transformers_models.auto import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )
    from xtuner.utils.dtypes import torch_dtype

    loader: Any = AutoModelForSequenceClassification
    try:
        with quiet_transformers():
            model = load_pretrained(
                loader,
                folder,
                trusted=trusted,
                num_labels=1,
                dtype=dtype if dtype == "auto" else torch_dtype(dtype),
                device_map="auto" if torch.cuda.is_available() else "cpu",
            )
            if adapter is not None:
                from xtuner.export.streaming_merge import read_adapter, resize_embeddings
                from xtuner.model.lora.adapter_files import load_adapter

                resize_embeddings(model, read_adapter(adapter))
                model = load_adapter(model, adapter)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            tr("the model cannot be loaded: {error}", error=error),
            where=Where(str(folder)),
        ) from error
    own = adapter if adapter is not None and any(adapter.glob("tokenizer*")) else folder
    tokenizer = load_pretrained(AutoTokenizer, own, trusted=trusted)
    if not tokenizer.chat_template:
        raise UserError(
            tr("the tokenizer has no chat template"),
            where=Where(str(own)),
        )
    return model.eval(), tokenizer


def _read(label: str, shown: bool) -> str | None:
    """A line that is not empty; None for ``exit`` and at the end of the input."""
    while True:
        try:
            line = input(label if shown else "").strip()
        except EOFError:
            return None
        if line.lower() == "exit":
            return None
        if line:
            return line
