"""The rules of the doctor: what each mistake means and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from xtuner.utils.lang import N_, translate

ERROR, WARNING, NOTE = "error", "warning", N_("note")
"""Errors stop or spoil the training, warnings likely harm it, notes are good to know."""


@dataclass(frozen=True)
class Rule:
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


RULES: Mapping[str, Rule] = {
    "bad-json": Rule(
        ERROR, N_("cannot be read"),
        N_("fix or delete these lines; nothing can be trained on them."),
    ),
    "no-rows": Rule(
        ERROR, N_("the file has no rows"),
        N_("check that this is the right file."),
    ),
    "not-an-object": Rule(
        ERROR, N_("the row is not an object"),
        N_('each row must be an object such as {"input": ..., "output": ...}.'),
    ),
    "missing-field": Rule(
        ERROR, N_("a field is missing"),
        N_("add the field, or use a map function that reads the fields which are there."),
    ),
    "wrong-type": Rule(
        ERROR, N_("a field has the wrong type"),
        N_("turn the value into the type that the map function reads."),
    ),
    "not-text": Rule(
        WARNING, N_("a number or switch instead of a text"),
        N_("it is trained as Python writes it, such as 1.5 or True; write it as a text."),
    ),
    "wrong-map-fn": Rule(
        ERROR, N_("the map function does not fit the rows"),
        N_("put these lines into the config:"),
    ),
    "mixed-layouts": Rule(
        ERROR, N_("rows of another layout than the rest"),
        N_("put rows of each layout into a file of their own and join the datasets with "
           "ConcatDataset, or use auto_map_fn."),
    ),
    "map-fn-failed": Rule(
        ERROR, N_("the map function fails on this row"),
        N_("fix the row or the function."),
    ),
    "mixed-types": Rule(
        WARNING, N_("a field changes its type"),
        N_("give the field one type in all rows; tables (Arrow) cannot hold two."),
    ),
    "bad-role": Rule(
        ERROR, N_("an unknown role"),
        N_("rename the role, or use auto_map_fn, which knows the common spellings."),
    ),
    "role-order": Rule(
        WARNING, N_("roles out of order"),
        N_("user and assistant must take turns, the user first."),
    ),
    "unanswered": Rule(
        WARNING, N_("the last question has no answer"),
        N_("it is dropped in training; add the answer or delete the message."),
    ),
    "no-answer": Rule(
        WARNING, N_("no answer to train on"),
        N_("the row is dropped; delete it or add an answer."),
    ),
    "empty-question": Rule(
        WARNING, N_("an empty question"),
        N_("fill it in or delete the row."),
    ),
    "empty-answer": Rule(
        WARNING, N_("an empty answer"),
        N_("the model would learn to say nothing; fill it in or delete the row."),
    ),
    "placeholder": Rule(
        WARNING, N_("the answer is a placeholder"),
        N_("a conversion probably went wrong; delete the row."),
    ),
    "not-trained": Rule(
        WARNING, N_("loss is switched off for every answer"),
        N_("the row teaches nothing; set output_with_loss (or loss) to true for an answer."),
    ),
    "template-token": Rule(
        WARNING, N_("a template's own token inside the content"),
        N_("for the model it ends or begins a turn; delete it (the template adds it)."),
    ),
    "invisible": Rule(
        WARNING, N_("invisible or control characters"),
        N_("they become tokens that nobody sees; delete them."),
    ),
    "broken-unicode": Rule(
        WARNING, N_("broken characters"),
        N_("the text was read in a wrong encoding or cut inside a character; export it as UTF-8."),
    ),
    "duplicate": Rule(
        WARNING, N_("the same row again"),
        N_("a row seen twice counts twice; delete the copies."),
    ),
    "same-choice": Rule(
        WARNING, N_("chosen and rejected are the same"),
        N_("the pair teaches nothing; delete it."),
    ),
    "missing-image": Rule(
        ERROR, N_("an image is missing"),
        N_("correct image_folder in the config or the path in the row."),
    ),
    "image-mark": Rule(
        WARNING, N_("<image> and the row's image do not agree"),
        N_("a row with an image needs <image> in a question, a row without one must not have it."),
    ),
    "open-code-block": Rule(
        NOTE, N_("an answer ends inside a code block"),
        N_("the answer may have been cut when it was made."),
    ),
    "too-long": Rule(
        WARNING, N_("longer than max_length: the row is left out"),
        N_("raise max_length, lower max_pixels, or scale images down: long_samples='shrink'."),
    ),
    "cut": Rule(
        WARNING, N_("cut at max_length: the end of the answer is lost"),
        N_("raise max_length, or shorten the rows."),
    ),
    "no-supervised-token": Rule(
        WARNING, N_("no token to train on"),
        N_("the question alone fills max_length, or the answer is empty; the row is dropped."),
    ),
    "no-stop": Rule(
        WARNING, N_("a trained answer does not end in a stop token"),
        N_("the model will not learn to stop; use the prompt_template of this model."),
    ),
    "cannot-build": Rule(
        ERROR, N_("training cannot build this dataset"),
        N_("fix what the message says."),
    ),
    "bad-row": Rule(
        ERROR, N_("training cannot use the row"),
        N_("fix or delete the row, or leave such rows out: process_hf_dataset(bad_rows='drop')."),
    ),
    "left-out": Rule(
        WARNING, N_("the row is left out (bad_rows='drop')"),
        N_("fix the row, if it should be trained on."),
    ),
    "empty-think": Rule(
        WARNING, N_("an empty think block is trained"),
        N_("models learn from it to stop thinking; set train_thinking='mask_empty'."),
    ),
    "image-in-text": Rule(
        WARNING, N_("an image in data that are trained as text"),
        N_("the model sees the mark, not the image; use VisionLanguageDataset, or delete the "
           "mark."),
    ),
    "few-steps": Rule(
        WARNING, N_("the run is very short"),
        N_("hardly anything is learnt in fewer than 20 optimizer steps."),
    ),
    "very-long": Rule(
        NOTE, N_("a very long row"),
        N_("look at it: often several rows have been joined by mistake."),
    ),
}  # fmt: skip
"""Every kind by its code."""
