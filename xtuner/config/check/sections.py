"""XT02xx: sections that are missing, misspelt, or that nothing reads."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from types import FunctionType

from xtuner.config.check.code import ERROR, WARNING
from xtuner.config.check.problem import Context, Finding, rule
from xtuner.config.sections import SECTIONS, known_keys
from xtuner.utils.lang import N_, tr

NEEDED = ("model", "train_dataloader", "optim_wrapper", "train_cfg")
NEEDED_HUGGINGFACE = ("model", "train_dataset", "training_args")
TYPED = ("model", "tokenizer", "optim_wrapper", "optim_wrapper.optimizer", "train_cfg")


def _unread(context: Context) -> Iterator[str]:
    """Top-level names that no section is made of and that nothing in the file uses.

    What used a name may have been replaced by ``--cfg-options``: the user need not remove it.
    """
    for name, value in context.values.items():
        private = name.startswith("_") or isinstance(value, FunctionType | type)
        if name not in SECTIONS and name not in context.names_read and not private:
            yield name


def _meant(name: str) -> str | None:
    near = difflib.get_close_matches(name, SECTIONS, n=1, cutoff=0.8)
    return near[0] if near else None


@rule(
    "XT0201",
    ERROR,
    N_("a misspelt section"),
    N_("Nothing reads a section of this name, so its settings have no effect."),
    wrong="train_dataloder = dict(batch_size=1)",
    right="train_dataloader = dict(batch_size=1)",
)
def misspelt_section(context: Context) -> Iterator[Finding]:
    for name in _unread(context):
        meant = _meant(name)
        if meant and meant not in context.values:
            yield Finding(
                name,
                tr("nothing reads the section '{name}'", name=name),
                tr("did you mean '{meant}'?", meant=meant),
            )


@rule(
    "XT0202",
    WARNING,
    N_("a setting that nothing uses"),
    N_("The name is neither a section nor used by one: changing it changes nothing."),
    wrong="warmup = 0.1",
    right="warmup_ratio = 0.1\nparam_scheduler = [dict(type=LinearLR, end=warmup_ratio)]",
)
def unused_setting(context: Context) -> Iterator[Finding]:
    for name in _unread(context):
        meant = _meant(name)
        if not meant or meant in context.values:
            yield Finding(
                name,
                tr("'{name}' is set but nothing uses it", name=name),
                tr("remove it, or use it where it should act."),
            )


@rule(
    "XT0203",
    ERROR,
    N_("a required section is missing"),
    N_(
        "A run needs model, train_dataloader, optim_wrapper and train_cfg; a Trainer config "
        "(framework='huggingface') model, train_dataset and training_args."
    ),
    wrong="model = dict(type=SupervisedFinetune)",
    right="model = dict(type=SupervisedFinetune)\n"
    "train_dataloader = dict(batch_size=1)\n"
    "optim_wrapper = dict(optimizer=dict(type=AdamW))\n"
    "train_cfg = dict(type=TrainLoop, max_epochs=1)",
)
def missing_section(context: Context) -> Iterator[Finding]:
    needed = NEEDED_HUGGINGFACE if context.get("framework") == "huggingface" else NEEDED
    misspelt = {_meant(name) for name in _unread(context)}
    for name in needed:
        if context.get(name) is None and name not in misspelt:
            yield Finding(
                name,
                tr("the config has no '{name}'", name=name),
                tr("'xtuner copy-cfg quickstart .' gives a whole config to compare with."),
            )


@rule(
    "XT0204",
    ERROR,
    N_("a section without a type"),
    N_("The type says which class or function to build; the other keys are its arguments."),
    wrong="train_cfg = dict(max_epochs=1)",
    right="train_cfg = dict(type=TrainLoop, max_epochs=1)",
)
def missing_type(context: Context) -> Iterator[Finding]:
    for key in TYPED:
        value = context.get(key)
        if key == "train_cfg" and isinstance(value, dict) and "by_epoch" in value:
            continue  # mmengine's older form, which says in this way which loop it means
        if isinstance(value, dict) and "type" not in value:
            yield Finding(
                key,
                tr("'{key}' does not say what to build", key=key),
                tr("add type=..."),
            )
    for name in NEEDED:
        value = context.get(name)
        if isinstance(value, list | tuple | str | int | float):
            is_tuple = isinstance(value, tuple) and len(value) == 1
            yield Finding(
                name,
                tr("'{key}' does not say what to build", key=name),
                tr("a comma at the end of the line makes a tuple: delete it.")
                if is_tuple
                else tr("write it as {name} = dict(type=..., ...).", name=name),
            )
    for key, section in context.dicts():
        kind = dict.get(section, "type", "")
        if kind is None or (isinstance(kind, type) and kind.__module__ == "builtins"):
            named = None if kind is None else kind.__name__
            yield Finding(
                f"{key}.type",
                tr("type={kind} builds nothing that a run can use", kind=named),
                tr("write the class or function that the section is for."),
            )


@rule(
    "XT0205",
    ERROR,
    N_("a setting that the section does not have"),
    N_(
        "The section takes a fixed set of keys; another one has no effect or is an error when "
        "the run starts."
    ),
    wrong="randomness = dict(sed=0)",
    right="randomness = dict(seed=0)",
)
def unknown_key_of_section(context: Context) -> Iterator[Finding]:
    for key, value in context.dicts():
        known = known_keys(tuple(key.split(".")))
        if known is None or (dict.get(value, "type") is not None and key != "train_dataloader"):
            continue
        for name in dict.keys(value):
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                yield Finding(
                    f"{key}.{name}",
                    tr("'{key}' has no setting '{name}'", key=key, name=name),
                    tr("did you mean '{near}'?", near=near[0])
                    if near
                    else tr("there are: {known}", known=sorted(known)),
                    at_key=True,
                )


@rule(
    "XT0206",
    ERROR,
    N_("validation or test without data"),
    N_(
        "val_cfg or val_evaluator needs val_dataloader, test_cfg or test_evaluator needs "
        "test_dataloader."
    ),
    wrong="val_cfg = dict()",
    right="val_cfg = dict()\nval_dataloader = dict(batch_size=1)",
)
def incomplete_evaluation(context: Context) -> Iterator[Finding]:
    """Validation and test need data; without an evaluator they measure the loss."""
    for part in ("val", "test"):
        data = f"{part}_dataloader"
        there = [f"{part}_{end}" for end in ("cfg", "evaluator")]
        there = [name for name in there if context.get(name) is not None]
        if there and context.get(data) is None:
            yield Finding(
                there[0],
                tr("{there} without {data}", there=tr(" and ").join(there), data=data),
                tr("add a {data}.", data=data),
            )
