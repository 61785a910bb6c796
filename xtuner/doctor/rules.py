"""The kinds of mistakes that the doctor knows: what each means and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from xtuner.utils.lang import N_, translate

ERROR, WARNING, NOTE = "error", "warning", "note"
"""Errors stop or spoil the training, warnings likely harm it, notes are good to know."""


@dataclass(frozen=True)
class Kind:
    """One kind of mistake: how bad it is, its name and the advice (marked messages)."""

    level: str
    marked_title: str
    marked_advice: str

    @property
    def title(self) -> str:
        return translate(self.marked_title)

    @property
    def advice(self) -> str:
        return translate(self.marked_advice)


KINDS: Mapping[str, Kind] = {
    "bad-json": Kind(
        ERROR, N_("cannot be read"),
        N_("mend or delete these lines; nothing can be trained on them."),
    ),
    "no-rows": Kind(
        ERROR, N_("the file has no rows"),
        N_("check that this is the right file."),
    ),
    "not-an-object": Kind(
        ERROR, N_("the row is not an object"),
        N_('each row must be an object such as {"input": ..., "output": ...}.'),
    ),
    "missing-field": Kind(
        ERROR, N_("a field is missing"),
        N_("add the field, or use a map function that reads the fields which are there."),
    ),
    "wrong-type": Kind(
        ERROR, N_("a field has the wrong type"),
        N_("turn the value into the type that the map function reads."),
    ),
    "wrong-map-fn": Kind(
        ERROR, N_("the map function does not fit the rows"),
        N_("put these lines into the config:"),
    ),
    "mixed-layouts": Kind(
        ERROR, N_("rows of another layout than the rest"),
        N_("put rows of each layout into a file of their own and join the datasets with "
           "ConcatDataset, or use auto_map_fn."),
    ),
    "map-fn-failed": Kind(
        ERROR, N_("the map function fails on this row"),
        N_("mend the row or the function."),
    ),
    "mixed-types": Kind(
        WARNING, N_("a field changes its type"),
        N_("give the field one type in all rows; tables (Arrow) cannot hold two."),
    ),
    "bad-role": Kind(
        ERROR, N_("an unknown role"),
        N_("rename the role, or use auto_map_fn, which knows the common spellings."),
    ),
    "role-order": Kind(
        WARNING, N_("roles out of order"),
        N_("user and assistant must take turns, the user first."),
    ),
    "unanswered": Kind(
        WARNING, N_("the last question has no answer"),
        N_("it is dropped in training; add the answer or delete the message."),
    ),
    "no-answer": Kind(
        WARNING, N_("no answer to train on"),
        N_("the row is dropped; delete it or add an answer."),
    ),
    "empty-question": Kind(
        WARNING, N_("an empty question"),
        N_("fill it in or delete the row."),
    ),
    "empty-answer": Kind(
        WARNING, N_("an empty answer"),
        N_("the model would learn to say nothing; fill it in or delete the row."),
    ),
    "placeholder": Kind(
        WARNING, N_("the answer is a placeholder"),
        N_("a conversion probably went wrong; delete the row."),
    ),
    "not-trained": Kind(
        WARNING, N_("loss is switched off for every answer"),
        N_("the row teaches nothing; set output_with_loss (or loss) to true for an answer."),
    ),
    "template-token": Kind(
        WARNING, N_("a template's own token inside the content"),
        N_("the model takes it for a border; delete it from the data (the template adds it)."),
    ),
    "invisible": Kind(
        WARNING, N_("invisible or control characters"),
        N_("they become tokens that nobody sees; delete them."),
    ),
    "broken-unicode": Kind(
        WARNING, N_("broken characters"),
        N_("the text was read in a wrong encoding or cut inside a character; export it as UTF-8."),
    ),
    "duplicate": Kind(
        WARNING, N_("the same row again"),
        N_("a row seen twice counts twice; delete the copies."),
    ),
    "same-choice": Kind(
        WARNING, N_("chosen and rejected are the same"),
        N_("the pair teaches nothing; delete it."),
    ),
    "missing-image": Kind(
        ERROR, N_("an image is missing"),
        N_("correct image_folder in the config or the path in the row."),
    ),
    "image-mark": Kind(
        WARNING, N_("<image> and the row's image do not agree"),
        N_("a row with an image needs <image> in a question, a row without one must not have it."),
    ),
    "open-code-block": Kind(
        NOTE, N_("an answer ends inside a code block"),
        N_("the answer may have been cut when it was made."),
    ),
    "cut": Kind(
        WARNING, N_("cut at max_length: the end of the answer is lost"),
        N_("raise max_length, or shorten the rows."),
    ),
    "no-supervised-token": Kind(
        WARNING, N_("no token to train on"),
        N_("the question alone fills max_length, or the answer is empty; the row is dropped."),
    ),
    "no-stop": Kind(
        WARNING, N_("a trained answer does not end in a stop token"),
        N_("the model will not learn to stop; use the prompt_template of this model."),
    ),
    "cannot-build": Kind(
        ERROR, N_("training cannot build this dataset"),
        N_("mend what the message says."),
    ),
    "very-long": Kind(
        NOTE, N_("a very long row"),
        N_("look at it: often several rows have been joined by mistake."),
    ),
}  # fmt: skip
"""Every kind by its code."""
