"""XT0341: names by string that mmengine's registries do not have, found before the run asks them.

The tables are those of mmengine and torch, so that nothing need be imported to know them;
``tests/config/check/test_registered.py`` compares them with the registries.
"""

from __future__ import annotations

import ast
import difflib
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from xtuner.config.check import packages
from xtuner.config.check.code import ERROR
from xtuner.config.check.packages import OTHER_OPTIMIZERS, PACKAGES
from xtuner.config.check.problem import Context, Finding, rule
from xtuner.config.names import NotThere, module_file
from xtuner.config.values import dotted_name
from xtuner.utils.lang import N_, tr, translate

TORCH_OPTIMIZERS = (
    *("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "LBFGS", "NAdam"),
    *("Muon", "RAdam", "RMSprop", "Rprop", "SGD", "SparseAdam"),
)
SCHEDULERS = (
    *("Constant", "CosineAnnealing", "CosineRestart", "Exponential", "Linear", "MultiStep"),
    *("OneCycle", "Poly", "ReduceOnPlateau", "Step"),
)


@dataclass(frozen=True)
class Registered:
    """What one registry has.

    Attributes:
        marked_kind: what its names stand for, a marked message.
        places: keys whose ``type`` is looked up in it, without the numbers in lists.
        names: those that a string may give.
        classes: those that are only known as imported classes, with their modules.
    """

    marked_kind: str
    places: Sequence[str]
    names: Sequence[str]
    classes: Mapping[str, str]


REGISTRIES: Mapping[str, Registered] = {
    "OPTIMIZERS": Registered(
        N_("optimizer"),
        ("optim_wrapper.optimizer",),
        # "Adafactor" is that of transformers, where it is installed.
        (*OTHER_OPTIMIZERS, "TorchAdafactor", *TORCH_OPTIMIZERS),
        {},
    ),
    "HOOKS": Registered(
        N_("hook"),
        ("default_hooks.*", "custom_hooks"),
        (
            *("CheckpointHook", "DistSamplerSeedHook", "EMAHook", "EarlyStoppingHook"),
            *("EmptyCacheHook", "IterTimerHook", "LoggerHook", "NPUProfilerHook"),
            *("NaiveVisualizationHook", "ParamSchedulerHook", "PrepareTTAHook", "ProfilerHook"),
            *("RuntimeInfoHook", "SyncBuffersHook"),
            # XTuner's own; adapting imports them.
            *("DatasetInfoHook", "EvaluateChatHook", "HFCheckpointHook", "MetricsHook"),
            *("ProgressHook", "ThroughputHook", "VarlenAttnArgsToMessageHubHook"),
        ),
        {},
    ),
    "DATA_SAMPLERS": Registered(
        N_("sampler"),
        ("*_dataloader.sampler", "*_dataloader.batch_sampler"),
        ("DefaultSampler", "InfiniteSampler"),
        {
            **dict.fromkeys(
                ("LengthGroupedSampler", "InternRepoSampler"), "xtuner.dataset.samplers"
            ),
            "SequenceParallelSampler": "xtuner.parallel.sequence",
        },
    ),
    "FUNCTIONS": Registered(
        N_("collate function"),
        ("*_dataloader.collate_fn",),
        ("default_collate", "pseudo_collate"),
        dict.fromkeys(
            (
                *("default_collate_fn", "mmlu_collate_fn", "preference_collate_fn"),
                "vision_language_collate_fn",
            ),
            "xtuner.dataset.collate_fns",
        ),
    ),
    "LOOPS": Registered(
        N_("loop"),
        ("train_cfg", "val_cfg", "test_cfg"),
        # Adapting imports TrainLoop.
        ("TrainLoop", "EpochBasedTrainLoop", "IterBasedTrainLoop", "ValLoop", "TestLoop"),
        {},
    ),
    "PARAM_SCHEDULERS": Registered(
        N_("scheduler"),
        ("param_scheduler", "param_scheduler.*"),
        tuple(
            f"{name}{kind}"
            for name in SCHEDULERS
            for kind in ("LR", "Momentum", "ParamScheduler")
            if (name, kind) != ("OneCycle", "Momentum")
        ),
        {},
    ),
    "VISUALIZERS": Registered(N_("visualizer"), ("visualizer",), ("Visualizer",), {}),
    "VISBACKENDS": Registered(
        N_("backend of the visualizer"),
        ("visualizer.vis_backends",),
        ("LocalVisBackend", *(name for name in PACKAGES if name.endswith("VisBackend"))),
        {},
    ),
    "LOG_PROCESSORS": Registered(N_("log processor"), ("log_processor",), ("LogProcessor",), {}),
}
"""By the name of the registry in ``mmengine.registry``."""

BUILT_IN = ("xtuner", "mmengine", "torch", "transformers", "peft", "datasets", "bitsandbytes")
"""Packages that register no other names than those of the tables."""


@rule(
    "XT0341",
    ERROR,
    N_("a registered name that does not exist"),
    N_(
        "A name by string is looked up in the registries of mmengine: optimizers of torch and of "
        "installed packages (bitsandbytes, lion_pytorch), hooks, samplers, loops, schedulers and "
        "backends of the visualizer. Anything else is imported in the config and given as "
        "type=TheClass."
    ),
    wrong="optim_wrapper = dict(optimizer=dict(type='AdamX'))",
    right="optim_wrapper = dict(optimizer=dict(type='AdamW'))",
)
def unknown_name(context: Context) -> Iterator[Finding]:
    """A name by string that no registry has; own ones are registered by ``custom_imports``."""
    for key, value in context.dicts():
        name, registered = dict.get(value, "type"), _registry_at(key)
        if registered is None or not isinstance(name, str) or "." in name:
            continue
        package = OTHER_OPTIMIZERS.get(name)
        if name in registered.names:
            if package and packages.is_missing(package):
                message = tr("{name} needs the package '{package}'", name=name, package=package)
                yield Finding(f"{key}.type", message, f"pip install {package}")
        elif not may_be_registered(context, value, name):
            kind = translate(registered.marked_kind)
            message = tr("there is no {kind} {name!r}", kind=kind, name=name)
            yield Finding(f"{key}.type", message, _hint(registered, name))


def _registry_at(key: str) -> Registered | None:
    """The registry that the ``type`` of the dict at a key is looked up in."""
    parts = [part for part in key.split(".") if not part.isdigit()]
    for registered in REGISTRIES.values():
        for place in registered.places:
            wanted = place.split(".")
            if len(wanted) == len(parts) and all(map(fnmatchcase, parts, wanted)):
                return registered
    return None


def _hint(registered: Registered, name: str) -> str:
    if name in registered.classes:
        module = registered.classes[name]
        return f"from {module} import {name}; type={name}"
    known = {each.lower(): each for each in (*registered.names, *registered.classes)}
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    if not near:
        return tr("import its class in the config and write type=TheClass.")
    return tr("did you mean '{near}'?", near=known[near[0]])


def may_be_registered(context: Context, settings: dict[str, object], name: str) -> bool:
    """Whether something that the config loads may register a name; it is not loaded to find out."""
    if context.get("custom_imports"):
        return True
    if any(scope not in (None, "mmengine") for scope in _scopes(context, settings)):
        return True
    statements = list(ast.walk(context.source.tree))
    if any(isinstance(node, ast.ImportFrom) and node.level for node in statements):
        return True  # a base config, or a module of the config's package
    if any(
        isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name
        for node in statements
    ):
        return True
    functions = [dict.get(each, "type") for each in context.get("before_run") or ()]
    modules = [
        each if isinstance(each, str) else (dotted_name(each) or ("",))[0] for each in functions
    ]
    if any(module.partition(".")[0] not in BUILT_IN for module in modules):
        return True
    return any(_mentions(module, name) for _, module, _ in context.source.imports())


def _scopes(context: Context, settings: dict[str, object]) -> tuple[object, object]:
    return context.get("default_scope"), dict.get(settings, "_scope_")


@functools.lru_cache(maxsize=256)
def _mentions(module: str, name: str) -> bool:
    """Whether importing a module may register a name: a package may, a file that has the name."""
    root = module.partition(".")[0]
    if root in BUILT_IN or root in sys.stdlib_module_names:
        return False
    try:
        file = module_file(module)
    except NotThere:
        return False  # XT0101 says so
    if file is None or root != module or file.name == "__init__.py":
        return True
    return name in file.read_text("utf-8", errors="replace")
