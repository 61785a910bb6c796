"""XT034x: packages and registered names that a run would miss only after the data are prepared."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterator, Mapping

from xtuner.config.check.code import ERROR
from xtuner.config.check.problem import Context, Finding, rule
from xtuner.config.values import name_of
from xtuner.utils.lang import N_, tr

PACKAGES: Mapping[str, str] = {
    "BitsAndBytesConfig": "bitsandbytes",
    "DeepSpeedStrategy": "deepspeed",
    "TensorboardVisBackend": "tensorboard",
    "WandbVisBackend": "wandb",
    "MLflowVisBackend": "mlflow",
    "ClearMLVisBackend": "clearml",
    "NeptuneVisBackend": "neptune",
    "DVCLiveVisBackend": "dvclive",
    "AimVisBackend": "aim",
    "SwanlabVisBackend": "swanlab",
}
"""What a type needs to be built."""

TORCH_OPTIMIZERS = (
    *("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "LBFGS", "NAdam"),
    *("Muon", "RAdam", "RMSprop", "Rprop", "SGD", "SparseAdam"),
)
OTHER_OPTIMIZERS: Mapping[str, str] = {
    **dict.fromkeys(("DAdaptAdaGrad", "DAdaptAdam", "DAdaptSGD"), "dadaptation"),
    "Lion": "lion_pytorch",
    "SophiaG": "sophia",
    **dict.fromkeys(
        (
            *("AdamW8bit", "Adam8bit", "Adagrad8bit", "PagedAdam8bit", "PagedAdamW8bit"),
            *("LAMB8bit", "LARS8bit", "RMSprop8bit", "Lion8bit", "PagedLion8bit", "SGD8bit"),
        ),
        "bitsandbytes",
    ),
    **dict.fromkeys(("ZeroRedundancyOptimizer",), "torch"),
}
"""Optimizers that mmengine registers where their package is installed."""


def _is_missing(package: str) -> bool:
    return importlib.util.find_spec(package) is None


@rule(
    "XT0340",
    ERROR,
    N_("a package that the run needs is not installed"),
    N_("The run would stop when it builds this part, after the data are prepared."),
    wrong="quantization = dict(type=BitsAndBytesConfig, load_in_4bit=True)\n"
    "model = dict(llm=dict(quantization_config=quantization))",
    right="pip install bitsandbytes",
)
def missing_package(context: Context) -> Iterator[Finding]:
    for key, value in context.dicts():
        package = PACKAGES.get(name_of(dict.get(value, "type")))
        if package and _is_missing(package):
            yield Finding(
                f"{key}.type",
                tr(
                    "{kind} needs the package '{package}', which is not installed",
                    kind=name_of(dict.get(value, "type")),
                    package=package,
                ),
                f"pip install {package}",
            )


@rule(
    "XT0341",
    ERROR,
    N_("an optimizer that does not exist"),
    N_(
        "An optimizer by name is one of torch or of an installed package (bitsandbytes, "
        "lion_pytorch); any other is imported in the config and given as type=TheClass."
    ),
    wrong="optim_wrapper = dict(optimizer=dict(type='AdamX'))",
    right="optim_wrapper = dict(optimizer=dict(type='AdamW'))",
)
def unknown_optimizer(context: Context) -> Iterator[Finding]:
    """An optimizer by its registered name; own ones are registered by ``custom_imports``."""
    key = "optim_wrapper.optimizer.type"
    name = context.get(key)
    if not isinstance(name, str) or "." in name or context.get("custom_imports"):
        return
    package = OTHER_OPTIMIZERS.get(name)
    if package and _is_missing(package):
        message = tr("{name} needs the package '{package}'", name=name, package=package)
        yield Finding(key, message, f"pip install {package}")
    elif not package and name not in TORCH_OPTIMIZERS:
        known = {each.lower(): each for each in (*OTHER_OPTIMIZERS, *TORCH_OPTIMIZERS)}
        near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
        yield Finding(
            key,
            tr("there is no optimizer {name!r}", name=name),
            tr("did you mean '{near}'?", near=known[near[0]])
            if near
            else tr("import its class in the config and write type=TheClass."),
        )
