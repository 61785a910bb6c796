"""XT0340: packages that a run would miss only after the data are prepared."""

from __future__ import annotations

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


def is_missing(package: str) -> bool:
    """Whether a package cannot be imported; it is not imported to find out."""
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
        if package and is_missing(package):
            yield Finding(
                f"{key}.type",
                tr(
                    "{kind} needs the package '{package}', which is not installed",
                    kind=name_of(dict.get(value, "type")),
                    package=package,
                ),
                f"pip install {package}",
            )
