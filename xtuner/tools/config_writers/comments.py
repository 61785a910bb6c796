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
    N_("packed samples do not attend to each other"),
    N_("the tokenizer that made the tokens of your data"),
    N_("visual encoder"),
    N_("projector weights that pretraining saved"),
    N_("strength of the penalty for leaving the reference model"),
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
