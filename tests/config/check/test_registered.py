"""Names by string: those that the registries have pass, others are named with the nearest one."""

from __future__ import annotations

import pytest

from tests.config.check.test_packages import BASE, found
from xtuner.config.adapt.engine_types import HOOKS
from xtuner.config.check.packages import OTHER_OPTIMIZERS, PACKAGES
from xtuner.config.check.registered import REGISTRIES, TORCH_OPTIMIZERS
from xtuner.config.load import load
from xtuner.registry import BUILDER

PLACES = {
    "OPTIMIZERS": "optim_wrapper['optimizer'] = dict(type={!r}, lr=2e-4)",
    "HOOKS": "custom_hooks.append(dict(type={!r}))",
    "DATA_SAMPLERS": "train_dataloader['sampler'] = dict(type={!r}, shuffle=True)",
    "FUNCTIONS": "train_dataloader['collate_fn'] = dict(type={!r})",
    "LOOPS": "train_cfg = dict(type={!r}, max_epochs=3)",
    "PARAM_SCHEDULERS": "param_scheduler = [dict(type={!r}, end=5)]",
    "VISUALIZERS": "visualizer = dict(type={!r})",
    "VISBACKENDS": "visualizer = dict(type='Visualizer', vis_backends=[dict(type={!r})])",
    "LOG_PROCESSORS": "log_processor = dict(type={!r})",
}


def problems(line: str, tmp_path) -> list[tuple[str, str]]:
    """Messages and hints of XT0341 for the base config with a line more."""
    lines = found(f"{BASE.read_text()}\n{line}\n", tmp_path)
    return [(message, hint) for code, message, hint in lines if code == "XT0341"]


@pytest.mark.parametrize("registry", REGISTRIES)
def test_the_names_are_those_of_the_registry(registry):
    import mmengine.registry
    import mmengine.runner

    from xtuner.engine.runner import finetune_runner  # noqa: F401 (registers)

    known = getattr(mmengine.registry, registry)
    known.import_from_location()
    base_class = {"Optimizer"}
    there = {
        name
        for name, kind in known.module_dict.items()
        if kind.__module__.startswith(("mmengine.", "torch."))
    }
    lazily = {*OTHER_OPTIMIZERS, *PACKAGES, *HOOKS, "TrainLoop", "MetricsHook", "ProgressHook"}
    names = set(REGISTRIES[registry].names)
    assert there - base_class <= names
    assert {name for name in names - lazily if name not in TORCH_OPTIMIZERS} <= there


def test_adapting_imports_the_hooks_of_xtuner():
    from xtuner.engine import hooks

    assert set(HOOKS) <= set(hooks.__all__) & set(REGISTRIES["HOOKS"].names)


@pytest.mark.parametrize("registry", REGISTRIES)
def test_classes_are_where_the_hint_says(registry):
    for name, module in REGISTRIES[registry].classes.items():
        assert BUILDER.get(f"{module}.{name}") is not None


@pytest.mark.parametrize("registry", REGISTRIES)
def test_a_name_that_is_nearly_right(registry, tmp_path):
    right = REGISTRIES[registry].names[-1]
    assert problems(PLACES[registry].format(right), tmp_path) == []
    ((message, hint),) = problems(PLACES[registry].format(f"{right}z"), tmp_path)
    assert message.endswith(f" {right + 'z'!r}")
    assert hint == f"did you mean '{right}'?"


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("train_dataloader['sampler']['type'] = 'LengthGroupedSampler'",
         "from xtuner.dataset.samplers import LengthGroupedSampler; type=LengthGroupedSampler"),
        ("default_hooks['timer'] = dict(type='Itertimerhook')", "did you mean 'IterTimerHook'?"),
        ("val_cfg = dict(type='valloop')", "did you mean 'ValLoop'?"),
        ("param_scheduler = dict(type='CosineAnnealing')", "did you mean 'CosineAnnealingLR'?"),
        ("custom_hooks = [dict(type='Qqq')]",
         "import its class in the config and write type=TheClass."),
    ],
)  # fmt: skip
def test_other_names(line, hint, tmp_path):
    ((_, found_hint),) = problems(line, tmp_path)
    assert found_hint == hint


@pytest.mark.parametrize(
    "line",
    [
        "custom_imports = dict(imports=['json'])",
        "def mine(): ...\nbefore_run = [dict(type=mine)]",
        "before_run = [dict(type='own_hooks.mine')]",
        "default_scope = 'mmdet'",
        "custom_hooks[-1]['_scope_'] = 'mmdet'",
        "custom_hooks[-1]['type'] = 'mmdet.MyHook'",
        "from own_hooks import Other\nx = Other",
        "import yaml",  # a package may register anything
        "class MyHook:\n    pass",
    ],
)
def test_names_that_something_may_register_are_left_alone(line, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_hooks.py").write_text("class Other: ...\nclass MyHook: ...\n")
    own = "custom_hooks.append(dict(type='MyHook'))"
    assert problems(own, tmp_path)
    assert problems(f"{own}\n{line}", tmp_path) == []
    prepared = "from xtuner.quickstart import make_base\nbefore_run = [dict(type=make_base)]"
    assert problems(f"{own}\n{prepared}", tmp_path)
    elsewhere = "from own_hooks import Other\ncustom_hooks.append(dict(type='OurHook'))"
    assert problems(elsewhere, tmp_path)


def test_a_hook_of_xtuner_by_name_is_imported(tmp_path):
    from xtuner.config.adapt.machine import adapt_to_machine

    config = tmp_path / "c.py"
    config.write_text(BASE.read_text() + "\ncustom_hooks.append(dict(type='ThroughputHook'))\n")
    cfg = load(config).editable().config
    adapt_to_machine(cfg)
    assert dict.get(cfg.custom_hooks[-1], "type") is HOOKS["ThroughputHook"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("Adamw", "did you mean 'AdamW'?"),
        ("DAdaptAdam", "pip install dadaptation"),
        ("Lion", "pip install lion_pytorch"),
        ("Foo", "import its class in the config"),
        ("AdamW", None),
        ("PagedAdamW8bit", None),
    ],
)
def test_optimizers_by_name(name, hint, without, tmp_path):
    without("dadaptation", "lion_pytorch")
    text = BASE.read_text() + f"\noptim_wrapper['optimizer'] = dict(type='{name}', lr=2e-4)\n"
    wrong = found(text, tmp_path)
    if hint is None:
        assert wrong == []
    else:
        ((code, _, shown),) = wrong
        assert code == "XT0341" and shown.startswith(hint)
    own = text + "\ncustom_imports = dict(imports=['json'])\n"
    assert name in OTHER_OPTIMIZERS or found(own, tmp_path) == []


def test_torchs_optimizers_are_all_known():
    import torch

    kinds = [k for k in vars(torch.optim).values() if isinstance(k, type)]
    names = {k.__name__ for k in kinds if issubclass(k, torch.optim.Optimizer)} - {"Optimizer"}
    assert names <= set(TORCH_OPTIMIZERS)
