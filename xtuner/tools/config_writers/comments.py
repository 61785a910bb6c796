"""The comments of a config that is copied, in the user's language."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Sequence

from xtuner.utils.lang import N_, is_chinese, translate

TEXTS = (
    *(N_("Model"), N_("Data"), N_("Parallel"), N_("Scheduler & Optimizer"), N_("Save")),
    N_("Evaluate the generation performance during the training"),
    N_("a name on the Hugging Face hub or a local folder"),
    N_("a name on the hub or a local folder"),
    N_("packed samples do not attend to each other"),
    N_("the tokenizer that made the tokens of your data"),
    N_("visual encoder"),
    N_("projector weights that pretraining saved"),
    N_("DPO: pull of the reference model; ORPO: weight of the odds ratio"),
    N_("share of pairs whose labels may be swapped"),
    N_("sigmoid, robust, hinge, ipo, kto_pair, sppo_hard or nca_pair"),
    N_("a token that ends a sample; the reward is read there"),
    N_("ranking or focal"),
    N_("log_barrier, L2 or none"),
    N_("name of the assistant"),
    N_("where the rows are"),
    N_("subset of the dataset"),
    N_("your data: one file or more"),
    N_("all files of this kind below it are read"),
    N_("rows at most, taken at random"),
    N_("frames of each video at most, where rows have videos"),
    N_("frames of each second of a video"),
    N_("tokens of a row at most; images are never cut"),
    N_("videos that the questions are about"),
    N_("chat template; use the same in `xtuner chat`"),
    N_("tokens of a row; longer samples are truncated"),
    N_("pack several samples into a row, without padding"),
    N_("tokens of a packed row of pairs"),
    N_("GPUs that share each row (sequence parallelism)"),
    N_("rows of a micro-batch on each GPU"),
    N_("micro-batches of an optimizer step"),
    N_("worker processes of the data loader (0: none)"),
    N_("epochs over the data"),
    N_("peak learning rate"),
    N_("gradients are clipped to this norm"),
    N_("share of training for the warm-up of lr"),
    N_("micro-batches between checkpoints"),
    N_("checkpoints to keep (-1: all)"),
    N_("micro-batches between sample outputs"),
    N_("system prompt of the questions"),
    N_("images that the questions are about"),
    N_("larger images are scaled down to this many pixels"),
    N_("train the language model, not what sees"),
    N_("nor the layers between the two"),
    N_("prompts that are answered while training"),
    N_("rank of the adapters"),
    N_("scale of the adapters: lora_alpha / r"),
    N_("It needs several GPUs; on a machine with eight:"),
    N_("Curves in TensorBoard; wandb, swanlab and others likewise:"),
    N_("Rows are tokens already"),
    N_("keep a share of the rows (or a number of them) to validate with"),
    N_('or "shrink" their images, or stop with an "error"'),
    N_('name rows that cannot be read; or stop with an "error"'),
    N_("A row of the data as a conversation."),
    N_("batches to a step, one for each GPU of a row"),
    N_("batches between measurements of MMLU"),
    N_("a row is one book"),
    N_("positions are stretched to reach so far"),
    N_("samples packed into one row do not see each other"),
    N_("made by `xtuner preprocess refcoco`"),
    N_("The Trainer keeps the log and the checkpoints: see training_args above."),
    N_("On each of four machines with eight GPUs, RANK from 0 to 3:"),
    N_("Copyright (c) the XTuner authors. Licensed under the Apache License 2.0."),
    N_("Model: a small Llama with random weights, made on the spot"),
    N_("Data: self-introduction in Chinese and English"),
    N_("the name that the assistant learns to give itself"),
    N_("several conversations share one row"),
    N_("... without seeing each other"),
)
"""The comments of the settings and parts that configs are made of; a test compares."""

TOP = (
    N_("{model}: {method}, on {data}, {epochs} epochs."),
    N_("{model}: {method}, on {data}, {epochs} epoch."),
    N_("LLaVA of {model}: learning to see, language model {llm}, visual encoder {visual}."),
    N_("LLaVA of {model}: fine-tuning, language model {llm}, visual encoder {visual}."),
    *(N_("DPO, {method}, several pairs to a row"), N_("DPO, {method}")),
    *(N_("ORPO, {method}, several pairs to a row"), N_("ORPO, {method}")),
    *(N_("reward model, {method}, several pairs to a row"), N_("reward model, {method}")),
    N_("{count} rows of your own"),
    N_("{count} pairs of your own"),
    *(N_("full-parameter fine-tuning"), N_("full fine-tuning"), N_("lora fine-tuning")),
    *(N_("qlora fine-tuning"), N_("LoRA on 8-bit weights"), N_("reward model")),
    *(N_("OpenAssistant, rows of at most 512 tokens, unpacked"), N_("arXiv abstracts and titles")),
    *(N_("Stack Exchange (questions and answers)"), N_("Medical (Chinese)")),
    *(N_("Alpaca (English)"), N_("Alpaca (English and Chinese)"), N_("Alpaca-GPT4 (Chinese)")),
    *(N_("Alpaca (English and Chinese) and OpenAssistant"), N_("Chinese legal questions")),
    *(N_("MOSS-003-SFT, with and without plugins"), N_("MOSS-003-SFT with plugins")),
    *(N_("your own conversations ({layout})"), N_("your own conversations ({layout}), long")),
    *(N_("XTuner format"), N_("OpenAI messages"), N_("your own preferences (JSON lines)")),
    *(N_("tokens in {framework}'s layout"), N_("rows in {framework}'s layout")),
    *(N_("your own text"), N_("your own rows with images")),
    N_("LLaVA-Instruct (665k rows with images)"),
    N_("`xtuner preprocess arxiv` makes its file from arXiv's metadata (on Kaggle)."),
    N_("Its two files are those of {address}."),
    N_("Its files are those of {address}."),
    N_("It is on ModelScope: pip install modelscope."),
    N_("A row: {row}; other layouts are recognised too."),
    N_("A row: {row}, messages in each."),
    N_("A row: {row}"),
    N_("docs/en/llava.md says where its rows and images come from."),
    N_("It is trained by the Trainer of transformers."),
    N_("{model}: QLoRA, on OpenAssistant, 3 epochs, with five-shot MMLU measured meanwhile."),
    N_("{model}: pretraining on books of {tokens} tokens each (400 steps or so), {rows}."),
    *(N_("with a row on each GPU"), N_("with a row shared by four GPUs")),
    N_(
        "{model}: full-parameter fine-tuning on rows of {tokens} tokens, each shared by {gpus} "
        "GPUs, on {data}."
    ),
    N_(
        "LLaVA of {model}: fine-tuning with RefCOCO, so that it can point at what it sees; "
        "language model {llm}, visual encoder {visual}."
    ),
    N_("Full training of a tiny model that learns its own name, in a minute on two cores."),
    N_("LoRA on the tiny base model of `quickstart`: the same lesson, learnt by an adapter."),
    N_("QLoRA: an adapter on the tiny base model of `quickstart`, loaded in 4 bits."),
    N_("It needs no network: the base model and the data are made from files of the package."),
)
"""What the first comment of a config says, and what its fields may be; the first that fits."""


def in_users_language(text: str) -> str:
    """The text of a config with its comments in Chinese, where messages are in Chinese."""
    if not is_chinese():
        return text
    lines = text.splitlines(keepends=True)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        code, mark, comment = token.string.rpartition("# ")
        if token.type == tokenize.COMMENT and comment in TEXTS:
            row, column = token.start[0] - 1, token.start[1]
            lines[row] = f"{lines[row][:column]}{code}{mark}{translate(comment)}\n"
    # the first line is for ruff
    end = next(row for row, line in enumerate(lines) if row and not re.match("# [^ ]", line))
    return "".join([lines[0], *_top(lines[1:end]), *lines[end:]])


def _top(lines: Sequence[str]) -> list[str]:
    """The first comment; its sentences may take several lines."""
    texts = [line.removeprefix("# ").rstrip() for line in lines]
    translated = []
    while texts:
        for count in range(len(texts), 0, -1):
            text = " ".join(texts[:count])
            chinese = _sentence(text)
            if chinese != text or count == 1:
                break
        translated.append(f"# {chinese}\n")
        del texts[:count]
    return translated


def _sentence(text: str) -> str:
    """A sentence of ``TOP`` or a field of one in Chinese; others as they are."""
    for template in TOP:
        fields = re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+)", re.escape(template))
        found = re.fullmatch(fields, text)
        if found:
            return translate(
                template, **{name: _sentence(value) for name, value in found.groupdict().items()}
            )
    return text
