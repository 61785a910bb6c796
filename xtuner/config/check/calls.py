"""XT01xx: names that do not import, and calls that do not fit what they call."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator
from typing import Any

from mmengine.config.lazy import LazyObject

from xtuner.config.check.code import ERROR, WARNING
from xtuner.config.check.problem import Context, Finding, rule
from xtuner.config.compat import adapted_keys
from xtuner.config.names import NotThere
from xtuner.config.signatures import Parameters, missing, parameters_of
from xtuner.config.values import dotted_name, is_imported, name_of
from xtuner.utils.lang import N_, tr
from xtuner.utils.templates import AUTO_TEMPLATE, PROMPT_TEMPLATE, SYSTEM_TEMPLATE

# Packages that published configs name but that only some users install.
OPTIONAL_PACKAGES = frozenset({"modelscope", "deepspeed", "flash_attn", "lagent"})

# Arguments that the builder of a dict adds, by the key of the dict.
INSTALLABLE = OPTIONAL_PACKAGES | {
    *("bitsandbytes", "dadaptation", "lion_pytorch", "liger_kernel", "mlflow", "openpyxl"),
    *("pandas", "sentencepiece", "swanlab", "sympy", "tensorboard", "tiktoken", "timm"),
    *("torchvision", "wandb"),
}
"""Packages that a hint may tell to install: an unknown name may be anybody's on PyPI."""
SUPPLIED = {
    "optimizer": {"params"},
    "param_scheduler": {"optimizer", "param_name"},
    "sampler": {"dataset"},
    "vis_backends": {"save_dir"},
    "batch_sampler": {"sampler", "batch_size", "dataset"},
    "train_cfg": {"runner", "dataloader"},
    "val_cfg": {"runner", "dataloader", "evaluator"},
    "test_cfg": {"runner", "dataloader", "evaluator"},
}
# Keys that the builder of a dict takes out of it before the call.
CONSUMED = {
    "param_scheduler": {"convert_to_iter_based"},
    "optim_wrapper": {"constructor", "paramwise_cfg"},
    "custom_hooks": {"priority"},
    "default_hooks": {"priority"},
    "train_cfg": {"by_epoch"},
}
ALWAYS = {"type", "_scope_", "_delete_"}
# Keywords that from_pretrained of transformers takes through **kwargs.
LOADING = (
    *("trust_remote_code", "dtype", "torch_dtype", "quantization_config", "attn_implementation"),
    *("device_map", "revision", "cache_dir", "padding_side", "use_fast", "local_files_only"),
    *("low_cpu_mem_usage", "eos_token", "pad_token", "bos_token", "unk_token"),
)


@rule(
    "XT0101",
    ERROR,
    N_("a name that cannot be imported"),
    N_(
        "Imports of a config are loaded when the run builds its parts; a wrong one would stop "
        "the run there."
    ),
    wrong="from xtuner.model import SupervisedFinetuning",
    right="from xtuner.model import SupervisedFinetune",
)
def unknown_import(context: Context) -> Iterator[Finding]:
    for key, error in _missing(context):
        if error.package not in OPTIONAL_PACKAGES:
            yield Finding(key, *_not_there(error))


@rule(
    "XT0107",
    WARNING,
    N_("an optional package that is not installed"),
    N_("The config names a package that only some runs need. If this run uses it, install it."),
    wrong="from modelscope.msdatasets import MsDataset",
    right="from datasets import load_dataset",
)
def missing_optional_package(context: Context) -> Iterator[Finding]:
    for key, error in _missing(context):
        if error.package in OPTIONAL_PACKAGES:
            yield Finding(key, *_not_there(error))


def _missing(context: Context) -> Iterator[tuple[str, NotThere]]:
    """Imports that fail, by the imported name, and attributes that are not there, by their key."""
    failed = set()
    for name, module, original in context.source.imports():
        error = missing(LazyObject(module, original))
        if error is not None:
            failed.add(name)
            yield name, error
    for key, value in _imported_values(context):
        named = dotted_name(value) or ()
        error = missing(value) if len(named) == 3 else None
        if error is not None and not failed & {named[1], named[0]}:
            yield key, error


@rule(
    "XT0102",
    ERROR,
    N_("an argument that the callee does not take"),
    N_(
        "The dict is called with its keys as keyword arguments: one that the function or "
        "class does not have is an error when it is built."
    ),
    wrong="optimizer = dict(type=AdamW, learning_rate=1e-4)",
    right="optimizer = dict(type=AdamW, lr=1e-4)",
)
def unknown_argument(context: Context) -> Iterator[Finding]:
    for key, value, parameters in _calls(context):
        if parameters.any_keyword:
            continue
        for name in _arguments(key, value):
            if not parameters.takes(name):
                callee = name_of(dict.get(value, "type"))
                yield Finding(
                    f"{key}.{name}",
                    tr("{callee} takes no argument '{name}'", callee=callee, name=name),
                    _nearest(name, parameters.names),
                    at_key=True,
                )


@rule(
    "XT0103",
    ERROR,
    N_("a required argument is missing"),
    N_("The function or class has a parameter without a default value, and the config gives none."),
    wrong="train_dataset = dict(type=process_hf_dataset)",
    right="train_dataset = dict(type=process_hf_dataset, dataset=dict(type=load_dataset, "
    "path='json'))",
)
def missing_argument(context: Context) -> Iterator[Finding]:
    for key, value, parameters in _calls(context):
        if key.endswith(("collate_fn", "data_collator")):  # called with the samples later
            continue
        if _is_built_by_others(context, key):
            continue
        given = {*dict.keys(value), *_by_place(SUPPLIED, key)}
        lacking = [name for name in parameters.required if name not in given]
        if lacking:
            callee, listed = name_of(dict.get(value, "type")), ", ".join(map(repr, lacking))
            yield Finding(
                f"{key}.type",
                tr("{callee} needs {listed}", callee=callee, listed=listed),
                tr("add {lacking}=...", lacking=lacking[0]),
            )


@rule(
    "XT0104",
    WARNING,
    N_("an argument that looks misspelt"),
    N_("The callee accepts any keyword (**kwargs), so a misspelt one has no effect and no error."),
    wrong="llm = dict(type=AutoModelForCausalLM.from_pretrained, quantisation_config=None)",
    right="llm = dict(type=AutoModelForCausalLM.from_pretrained, quantization_config=None)",
)
def likely_misspelt_argument(context: Context) -> Iterator[Finding]:
    """A callee with ``**kwargs`` accepts a misspelt argument too."""
    for key, value, parameters in _calls(context):
        if not parameters.any_keyword:
            continue
        loading = LOADING if name_of(dict.get(value, "type")).endswith("from_pretrained") else ()
        known = {*parameters.names, *loading}
        for name in _arguments(key, value):
            near = difflib.get_close_matches(name, known - {name}, n=1, cutoff=0.85)
            if name not in known and near:
                yield Finding(
                    f"{key}.{name}",
                    tr("'{name}' looks misspelt", name=name),
                    tr("did you mean '{near}'?", near=near[0]),
                    at_key=True,
                )


@rule(
    "XT0105",
    ERROR,
    N_("a template that does not exist"),
    N_(
        "PROMPT_TEMPLATE and SYSTEM_TEMPLATE have fixed names; 'auto' is the tokenizer's own "
        "chat template."
    ),
    wrong="prompt_template = PROMPT_TEMPLATE.qwen_chatt",
    right="prompt_template = PROMPT_TEMPLATE.qwen_chat",
)
def unknown_template(context: Context) -> Iterator[Finding]:
    tables = {"PROMPT_TEMPLATE": PROMPT_TEMPLATE, "SYSTEM_TEMPLATE": SYSTEM_TEMPLATE}
    for key, value in _imported_values(context):
        module, name, rest = (*(dotted_name(value) or ("", "")), "")[:3]
        if not module.startswith("xtuner.utils") or name not in tables or not rest:
            continue
        template = rest.partition(".")[0]
        if template not in tables[name] and template != "auto":
            yield Finding(
                key,
                tr("there is no {name}.{template}", name=name, template=template),
                _nearest(template, tuple(tables[name]), cutoff=0.3),
            )
    for key, value in _templates(context):
        if isinstance(value, dict) or is_imported(value):
            continue
        module, _, template = str(value).rpartition(".PROMPT_TEMPLATE.")
        is_known = template in PROMPT_TEMPLATE or value == AUTO_TEMPLATE
        if not is_known and module in ("", "xtuner.utils"):
            message = tr("there is no prompt template {name!r}", name=value)
            yield Finding(key, message, _nearest(template, tuple(PROMPT_TEMPLATE), cutoff=0.3))


def _templates(context: Context) -> Iterator[tuple[str, Any]]:
    """Prompt templates, or their names, each with its key."""
    for key in context.typed("template_map_fn_factory"):
        yield f"{key}.template", context.get(f"{key}.template", AUTO_TEMPLATE)
    for key in context.typed("EvaluateChatHook"):
        yield f"{key}.prompt_template", context.get(f"{key}.prompt_template") or AUTO_TEMPLATE


@rule(
    "XT0108",
    ERROR,
    N_("a lambda calls a name that the config imports"),
    N_(
        "Imports of a config are lazy. They are loaded when a function of the config runs, "
        "but not for a lambda."
    ),
    wrong="fn = lambda row: alpaca_map_fn(row)",
    right="def fn(row):\n    return alpaca_map_fn(row)",
)
def lambda_uses_lazy_import(context: Context) -> Iterator[Finding]:
    """Imports of a config are lazy: a function in it is run with them loaded, a lambda is not."""
    imported = context.source.imported()
    for name, node in _lambdas(context.source.tree):
        calls = [inner.func for inner in ast.walk(node) if isinstance(inner, ast.Call)]
        roots = [call.value if isinstance(call, ast.Attribute) else call for call in calls]
        names = [root.id for root in roots if isinstance(root, ast.Name) and root.id in imported]
        for called in dict.fromkeys(names):
            yield Finding(
                name,
                tr("this lambda calls '{name}', which the config imports", name=called),
                tr("write a function instead: 'def my_map_fn(row): ...'."),
            )


def _lambdas(tree: ast.Module) -> Iterator[tuple[str, ast.Lambda]]:
    """The lambdas outside functions, each with the setting that it is written in."""
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            for node in ast.walk(statement.value):
                if isinstance(node, ast.Lambda):
                    yield statement.targets[0].id, node


OURS = ("xtuner", "mmengine", "torch", "transformers", "peft", "datasets", "bitsandbytes")
"""Packages that build the dicts inside their own arguments as a config says."""


def _is_built_by_others(context: Context, key: str) -> bool:
    """Whether a dict is inside one of another package, which may add arguments of its own."""
    parts = key.split(".")
    for depth in range(1, len(parts)):
        named = dotted_name(context.get(f"{'.'.join(parts[:depth])}.type"))
        if named and named[0].partition(".")[0] not in OURS:
            return True
    return False


def _imported_values(context: Context) -> Iterator[tuple[str, Any]]:
    """All imported names in sections, each with its key."""
    for key, value in context.values.items():
        if is_imported(value):
            yield key, value
    for key, holder in context.dicts():
        for name in dict.keys(holder):
            value = dict.__getitem__(holder, name)
            if is_imported(value):
                yield f"{key}.{name}", value


def _calls(context: Context) -> Iterator[tuple[str, dict[str, Any], Parameters]]:
    """All dicts with a ``type`` whose parameters are known."""
    for key, value in context.dicts():
        kind = dict.get(value, "type")
        parameters = parameters_of(kind) if kind is not None else None
        if parameters is not None and "lambda" not in key:
            yield key, value, parameters


def _arguments(key: str, value: dict[str, Any]) -> Iterator[str]:
    """The keyword arguments of a call that its callee will see."""
    ignored = {*ALWAYS, *_by_place(CONSUMED, key), *adapted_keys(dict.get(value, "type"))}
    return (name for name in dict.keys(value) if name not in ignored)


def _by_place(table: dict[str, set[str]], key: str) -> set[str]:
    parts = [part for part in key.split(".") if not part.isdigit()]
    found = table.get(parts[-1], set())
    return found | (table.get(parts[0], set()) if len(parts) <= 2 else set())


def _not_there(error: NotThere) -> tuple[str, str | None]:
    if error.package:
        return (
            tr("there is no package '{package}' here", package=error.package),
            f"pip install {error.package}"
            if error.package in INSTALLABLE
            else tr(
                "a module of your own lies beside the config as {package}.py, or as a folder with "
                "the module in it; a package of somebody else is installed as its page says.",
                package=error.package,
            ),
        )
    if not error.name:
        return tr("there is no module '{module}'", module=error.module), None
    return (
        tr("'{name}' is not in '{module}'", name=error.name, module=error.module),
        None,
    )


def _nearest(name: str, names: tuple[str, ...], cutoff: float = 0.6) -> str | None:
    near = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    if near:
        return tr("did you mean '{near}'?", near=near[0])
    shown = ", ".join(names[:12])
    return tr("there are: {shown}", shown=shown) if names else None
