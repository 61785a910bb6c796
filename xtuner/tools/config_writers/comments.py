"""The comments of a config that is copied, in the user's language."""

from __future__ import annotations

import io
import tokenize

from xtuner.utils.lang import N_, is_chinese, translate

TEXTS = (
    *(N_("Model"), N_("Data"), N_("Parallel"), N_("Scheduler & Optimizer"), N_("Save")),
    N_("Evaluate the generation performance during the training"),
    N_("a name on the Hugging Face hub or a local folder"),
    N_("a name on the hub or a local folder"),
    N_("keep samples that share a row from seeing each other"),
    N_("the tokenizer that made the tokens of your data"),
    N_("what looks at the images"),
    N_("the projector, as the config of pretraining left it"),
    N_("how strongly to keep to the model before training"),
    N_("the share of preferences that may be the wrong way round"),
    N_("sigmoid, robust, hinge, ipo, kto_pair, sppo_hard or nca_pair"),
    N_("a token that ends a sample; the reward is read there"),
    N_("ranking or focal"),
    N_("log_barrier, L2 or none"),
    N_("what the assistant calls itself"),
    N_("where the rows are"),
    N_("a part of the dataset"),
    N_("your data: one file or more"),
    N_("all files of this kind below it are read"),
    N_("rows at most, taken at random"),
    N_("how turns are written; the same again in `xtuner chat`"),
    N_("tokens of a row; what is longer is cut"),
    N_("put several samples into one row, so that none is padding"),
    N_("tokens of a row of several pairs"),
    N_("GPUs that share one long row"),
    N_("rows on each GPU at a time"),
    N_("batches to a step of the optimizer"),
    N_("processes that fetch batches (0 means none)"),
    N_("times through the data"),
    N_("learning rate at its highest"),
    N_("gradients longer than this are shortened to it"),
    N_("the share of training in which lr rises"),
    N_("batches between checkpoints"),
    N_("how many to keep (-1 means all)"),
    N_("batches between evaluations"),
    N_("system prompt of the questions"),
    N_("what the questions are about"),
    N_("asked now and then, to see how training comes along"),
    N_("rank: what the adapters can hold, and what they cost"),
    N_("their share is lora_alpha / r"),
    N_("It needs several GPUs; on a machine with eight:"),
    N_("Curves in TensorBoard; wandb, swanlab and others likewise:"),
    N_("Rows are tokens already"),
)
"""The comments of the settings and parts that configs are made of; a test compares."""


def in_users_language(text: str) -> str:
    """The text of a config with its comments in Chinese, where messages are in Chinese."""
    if not is_chinese():
        return text
    lines = text.splitlines(keepends=True)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        comment = token.string.removeprefix("# ")
        if token.type == tokenize.COMMENT and comment in TEXTS:
            row, column = token.start[0] - 1, token.start[1]
            lines[row] = f"{lines[row][:column]}# {translate(comment)}\n"
    return "".join(lines)
