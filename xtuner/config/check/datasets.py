"""XT0324, XT0346 to XT0348: settings of datasets that no data can make right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from xtuner.config.check.code import ERROR
from xtuner.config.check.problem import Context, Finding, rule
from xtuner.config.check.registered import may_be_registered
from xtuner.config.names import NotThere, find
from xtuner.config.values import is_imported, is_number, name_of
from xtuner.utils.data_files import (
    SUFFIXES_OF,
    is_split,
    kind_of,
    loader_meant,
    loader_of,
    split_names,
)
from xtuner.utils.dataset_settings import CHOICES, wrong_settings
from xtuner.utils.lang import N_, tr
from xtuner.utils.templates import AUTO_TEMPLATE

FILES_HINT = "data_files=dict(train='data.json')"
SPLIT_HINT = "train, train[:100], train[10%:20%], train+validation"


@rule(
    "XT0324",
    ERROR,
    N_("dataset_map_fn is not a function"),
    N_("It takes a function that turns a row into a conversation, or None."),
    wrong="train_dataset = dict(type=process_hf_dataset, dataset_map_fn=True)",
    right="train_dataset = dict(type=process_hf_dataset, dataset_map_fn=alpaca_map_fn)",
)
def unknown_map_function(context: Context) -> Iterator[Finding]:
    """A row map function may be given by its key; the keys are those of list-dataset-format."""
    for key in context.typed(*CHOICES):
        for name in ("dataset_map_fn", "template_map_fn"):
            value = context.get(f"{key}.{name}")
            if is_number(value) or isinstance(value, bool | list):
                message = tr("expected a function, got {value!r}", value=value)
            elif isinstance(value, str) and not _is_function_name(context, key, name, value):
                message = tr("there is no map function {function!r}", function=value)
            else:
                continue
            yield Finding(f"{key}.{name}", message, tr("'xtuner list-dataset-format' lists them."))


def _is_function_name(context: Context, key: str, name: str, value: str) -> bool:
    """Whether a text may name a map function; one of another module may register its own."""
    if value == "auto" and context.kind(key).startswith("VisionLanguage"):
        return True
    if "." in value or may_be_registered(context, context.get(key), value):
        return True
    if not value.endswith("_map_fn"):
        return False
    try:
        find("xtuner.dataset.map_fns", value)
    except NotThere:
        return False
    return name == "dataset_map_fn"


@rule(
    "XT0346",
    ERROR,
    N_("a setting that the dataset refuses"),
    N_(
        "Some settings of a dataset take one of a few texts, others a number above 0, and some "
        "belong together: packing needs max_length, part='val' a val_size."
    ),
    wrong="train_dataset = dict(type=process_hf_dataset, max_length=2048, bad_rows='skip')",
    right="train_dataset = dict(type=process_hf_dataset, max_length=2048, bad_rows='drop')",
)
def refused_settings(context: Context) -> Iterator[Finding]:
    """What the dataset itself refuses when it is built, by the same ``wrong_settings``."""
    for key in context.typed(*CHOICES):
        section = context.get(key)
        settings = {name: dict.__getitem__(section, name) for name in dict.keys(section)}
        given = {name: value for name, value in settings.items() if not is_imported(value)}
        builder = name_of(settings.pop("type"))
        if given.get("max_length") is not None:
            del given["max_length"]  # XT0326 looks at it
        for wrong in wrong_settings(builder, given):
            if wrong.key not in settings or wrong.key in given:
                place = f"{key}.{wrong.key}" if wrong.key in settings else key
                yield Finding(place, wrong.message, wrong.hint)


@rule(
    "XT0347",
    ERROR,
    N_("template_arguments that the template does not take"),
    N_(
        "The tokenizer's own chat template (PROMPT_TEMPLATE.auto) takes arguments such as "
        "enable_thinking. The named templates are fixed texts."
    ),
    wrong="fn = dict(type=template_map_fn_factory, template=PROMPT_TEMPLATE.qwen_chat, "
    "template_arguments=dict(enable_thinking=False))",
    right="fn = dict(type=template_map_fn_factory, template=PROMPT_TEMPLATE.auto, "
    "template_arguments=dict(enable_thinking=False))",
)
def arguments_of_a_fixed_template(context: Context) -> Iterator[Finding]:
    callees = {"template_map_fn_factory": "template", "EvaluateChatHook": "prompt_template"}
    for key in context.typed(*callees):
        arguments = context.get(f"{key}.template_arguments")
        template = context.get(f"{key}.{callees[context.kind(key)]}")
        is_auto = template == AUTO_TEMPLATE or name_of(template).rpartition(".")[2] == "auto"
        if arguments is not None and not isinstance(arguments, dict):
            yield Finding(
                f"{key}.template_arguments",
                tr("expected {what}, got {value!r}", what="dict(...)", value=arguments),
                "template_arguments=dict(enable_thinking=False)",
            )
        elif arguments and template is not None and not is_auto:
            yield Finding(
                f"{key}.template_arguments",
                tr("a named template takes no template_arguments"),
                tr("template=PROMPT_TEMPLATE.auto uses the tokenizer's own chat template."),
            )


@rule(
    "XT0348",
    ERROR,
    N_("files that the loader cannot read"),
    N_(
        "load_dataset(path=...) says how files are read (json, csv, parquet, arrow, text), and "
        "data_files names those of each split."
    ),
    wrong="train_dataset = dict(type=load_dataset, path='json', data_files='data.csv')",
    right="train_dataset = dict(type=load_dataset, path='csv', data_files='data.csv')",
)
def files_of_another_loader(context: Context) -> Iterator[Finding]:
    for key in context.typed("load_dataset"):
        path = context.get(f"{key}.path")
        files = context.get(f"{key}.data_files")
        if path in SUFFIXES_OF and not files and not context.get(f"{key}.data_dir"):
            message = tr("load_dataset(path={path!r}) has no data_files", path=path)
            yield Finding(key, message, FILES_HINT)
        elif path in SUFFIXES_OF:
            yield from _wrong_files(key, path, files)
            yield from _wrong_split(context, key, files)
        elif files and isinstance(path, str) and (meant := loader_meant(path)):
            message = tr("there is no loader {path!r}", path=path)
            yield Finding(f"{key}.path", message, tr("use path={path!r}.", path=meant))


def _wrong_files(key: str, path: str, files: Any) -> Iterator[Finding]:
    for each in _paths(files):
        if not isinstance(each, str):
            message = tr("{value!r} is no path", value=each)
            yield Finding(f"{key}.data_files", message, FILES_HINT)
        elif (loader_of(each) or path) != path:
            yield Finding(
                f"{key}.path",
                tr(
                    "load_dataset(path={path!r}) cannot read a {suffix} file",
                    path=path,
                    suffix=kind_of(each),
                ),
                tr("use path={path!r}.", path=loader_of(each)),
            )
            return


def _paths(files: Any) -> Iterator[object]:
    """What the files of a loader are, each that is written out."""
    if isinstance(files, dict):
        for name in dict.keys(files):
            yield from _paths(dict.__getitem__(files, name))
    elif isinstance(files, list | tuple):
        for each in files:
            yield from _paths(each)
    elif files is not None and not is_imported(files) and not hasattr(files, "__fspath__"):
        yield files


def _wrong_split(context: Context, key: str, files: Any) -> Iterator[Finding]:
    """A split that none of the files is of."""
    outer = key.rpartition(".")[0]
    builder = name_of(context.get(f"{outer}.type"))
    own = context.get(f"{key}.split")
    place = f"{key}.split" if own is not None else f"{outer}.split"
    split = own if own is not None else context.get(place, "train")
    if own is None and builder not in CHOICES:
        return  # another reader of the splits
    named = dict.fromkeys(dict.keys(files) if isinstance(files, dict) else ["train"])
    if not isinstance(split, str):
        return
    place = place if context.get(place) is not None else f"{key}.data_files"
    if not is_split(split):
        yield Finding(place, tr("the split {split!r} cannot be read", split=split), SPLIT_HINT)
    elif not all(name in named for name in split_names(split, named)):
        message = tr("the dataset has no split {split!r}", split=split)
        yield Finding(place, message, tr("there are: {shown}", shown=", ".join(named)))
