"""Each proof holds for what is right, and fails when its bug is put in."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.dist import get_world_size
from torch._dynamo.exc import TorchDynamoException

from tests.proving.bases import FULL, LORA, document, options, save_base, save_rows
from xtuner.checkpoint import run_state
from xtuner.dataset.collate_fns import default_collate_fn
from xtuner.engine.optim import FinetuneOptimWrapper
from xtuner.engine.runner import loops
from xtuner.entry_point import main
from xtuner.export import trained_template
from xtuner.model import sft
from xtuner.model.backends import environment
from xtuner.model.backends.cpu import kernels
from xtuner.model.base import FinetuneModel
from xtuner.proving import children, gradient_proofs, prove, run_proofs
from xtuner.proving import subject as subject_module
from xtuner.proving.export_proofs import ExportProofs
from xtuner.proving.gradient_proofs import GradientProofs
from xtuner.proving.proof import CLAIMS, Measured, Proof, Skipped
from xtuner.proving.proof import prove as try_proof
from xtuner.proving.reduce import Limits
from xtuner.proving.run_proofs import RunProofs, save_initial
from xtuner.proving.subject import Subject
from xtuner.registry import BUILDER

Patch = pytest.MonkeyPatch
PADDED = ["pack_to_max_length=False", "use_varlen_attn=False"]
CONFIGS: dict[str, tuple[str, str, list[str]]] = {
    "lora": (LORA, "llama", []),
    "padded": (LORA, "llama", PADDED),
    "learned_positions": (FULL, "gpt2", []),
}
"""A config of the catalogue, a kind of model, and overrides."""
LIMITS = Limits(rows=6, tokens=64, batch_size=1, accumulative_counts=1, steps=2)


class Prepared:
    """A config prepared for proofs."""

    def __init__(self, folder: Path, key: str) -> None:
        name, kind, words = CONFIGS[key]
        base = save_base(folder / "base", kind)
        rows = save_rows(folder / "rows.jsonl")
        self.folder = folder / "proofs"
        self.folder.mkdir()
        given = document(name, options(base, rows, *words))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prove, "LIMITS", LIMITS)
            self.found = prove.prepare(given, self.folder, False)
        subject = Subject(self.found.config)
        save_initial(subject.model(), self.folder)
        self.count = len(subject.samples)

    def gradients(self) -> dict[str, Proof]:
        return by_name(GradientProofs(Subject(self.found.config)).all())

    def runs(self, folder: Path) -> RunProofs:
        """Runs that are made anew, in a folder of their own."""
        config = folder / "config.py"
        config.write_text(self.found.config.read_text("utf-8"), "utf-8")
        (folder / run_proofs.INITIAL).symlink_to(self.folder / run_proofs.INITIAL)
        return RunProofs(config, self.count, has_adapter=True)

    def exports(self, folder: Path) -> dict[str, Proof]:
        proofs = ExportProofs(Subject(self.found.config), self.found.config, self.found.base)
        proofs.written, proofs.merged_folder = folder / "exported", folder / "merged"
        return by_name(proofs.all())


def by_name(proofs: list[Proof]) -> dict[str, Proof]:
    return {proof.name: proof for proof in proofs}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Configs that are prepared when a test first needs them."""
    made: dict[str, Prepared] = {}

    def get(key: str) -> Prepared:
        if key not in made:
            made[key] = Prepared(tmp_path_factory.mktemp(key), key)
        return made[key]

    return get


def call_in_process(patch: Patch) -> None:
    """Make runs of one process in this one."""
    patch.setattr(children, "call", lambda work, *arguments, log: work(*arguments))


def failures(proofs: dict[str, Proof]) -> set[str]:
    return {name for name, proof in proofs.items() if proof.state == "failed"}


@pytest.mark.parametrize("key", CONFIGS)
def test_gradients_hold(prepared, key):
    found = prepared(key).gradients()
    assert not failures(found), found
    skipped = {name for name, proof in found.items() if proof.state == "skipped"}
    assert skipped == {"compiled", "gpu"}
    for name in ("plain", "packed"):
        assert 0 < found[name].difference < CLAIMS[name].bound / 10


def shifted_border(patch: Patch) -> None:
    module = sys.modules[default_collate_fn.__module__]

    whole = module._joined

    def shifted(instances: Any) -> dict[str, Any]:
        data = whole(instances)
        data["cumulative_len"][0][1:-1] += 1
        return data

    patch.setattr(module, "_joined", shifted)


def dropped_position_reset(patch: Patch) -> None:
    module = sys.modules[default_collate_fn.__module__]

    whole = module._joined

    def without_reset(instances: Any) -> dict[str, Any]:
        data = whole(instances)
        data["position_ids"] = torch.arange(data["input_ids"].shape[1])[None]
        return data

    patch.setattr(module, "_joined", without_reset)


def ignored_padding(patch: Patch) -> None:
    whole = FinetuneModel.inputs

    def padded_in_front(data: Any) -> dict[str, Any]:
        given = whole(data)
        given["position_ids"] = given["position_ids"].flip(1)
        del given["attention_mask"]
        return given

    patch.setattr(FinetuneModel, "inputs", staticmethod(padded_in_front))


def forgotten_lora_scale(patch: Patch) -> None:
    from xtuner.model.lora import fast_lora

    fields = fast_lora._Part

    def unscaled(*values: Any) -> Any:
        return fields(*values[:6], 1.0, *values[7:])

    patch.setattr(fast_lora, "_Part", unscaled)


def labels_not_shifted(patch: Patch) -> None:
    whole = sft.shift_labels

    def late(labels: torch.Tensor, *arguments: Any) -> torch.Tensor:
        return whole(labels.roll(1, dims=1), *arguments)

    patch.setattr(sft, "shift_labels", late)
    from xtuner.model import base

    patch.setattr(base, "shift_labels", late)


def all_tokens_in_the_mean(patch: Patch) -> None:
    def count(self: Any, data: Any) -> dict[str, int]:
        return {"tokens": data["labels"].numel()}

    patch.setattr(sft.SupervisedFinetune, "num_items", count)


def wrong_softmax_scale(patch: Patch) -> None:
    from transformers import AttentionInterface

    from xtuner.model.modules import attention

    whole = attention.attention

    def scaled(*arguments: Any, scaling: float, **settings: Any) -> Any:
        return whole(*arguments, scaling=2 * scaling, **settings)

    patch.setattr(attention, "attention", scaled)
    patch.setitem(AttentionInterface._global_mapping, attention.NAME, scaled)


def frozen_weight_that_trains(patch: Patch) -> None:
    whole = Subject.model

    def thawed(self: Subject, **changes: Any) -> Any:
        model = whole(self, **changes)
        model.llm.get_input_embeddings().weight.requires_grad_(True)
        return model

    patch.setattr(Subject, "model", thawed)


def trained_weight_without_gradient(patch: Patch) -> None:
    whole = Subject.model

    def detached(self: Subject, **changes: Any) -> Any:
        model = whole(self, **changes)
        layer = next(m for m in model.modules() if hasattr(m, "lora_B"))
        layer.forward = lambda x, *rest, **more: layer.get_base_layer()(x)
        return model

    patch.setattr(Subject, "model", detached)


def recomputed_otherwise(patch: Patch) -> None:
    from torch.utils import checkpoint

    def without_gradient(function: Callable[..., Any], *arguments: Any, **_: Any) -> Any:
        found = function(*arguments)
        scale = 1.01
        return found * scale if isinstance(found, torch.Tensor) else (found[0] * scale, *found[1:])

    patch.setattr(checkpoint, "checkpoint", without_gradient)
    from transformers import modeling_utils

    patch.setattr(modeling_utils, "checkpoint", without_gradient)


GRADIENT_MUTANTS = [
    (shifted_border, "lora", "packed"),
    (dropped_position_reset, "learned_positions", "packed"),
    (ignored_padding, "padded", "packed"),
    (forgotten_lora_scale, "lora", "plain"),
    (labels_not_shifted, "lora", "plain"),
    (all_tokens_in_the_mean, "lora", "plain"),
    (wrong_softmax_scale, "lora", "plain"),
    (frozen_weight_that_trains, "lora", "gradients"),
    (trained_weight_without_gradient, "lora", "gradients"),
    (recomputed_otherwise, "lora", "checkpointed"),
]


@pytest.mark.parametrize(("mutate", "key", "name"), GRADIENT_MUTANTS)
def test_gradients_fail(prepared, monkeypatch, mutate, key, name):
    proofs = GradientProofs(Subject(prepared(key).found.config))
    if name == "checkpointed":
        proofs.found  # noqa: B018  before the bug is put in
    mutate(monkeypatch)
    found = try_proof(name, getattr(proofs, name))
    assert found.state == "failed", found


@pytest.mark.slow
def test_compiled_kernels(prepared, monkeypatch):
    """They hold, fail where they compute otherwise, and are skipped where the compiler fails."""
    proofs = GradientProofs(Subject(prepared("lora").found.config), compile=True)
    monkeypatch.setattr(gradient_proofs, "COMPILERS", (sys.executable,))

    def scaled(function: Any) -> Any:
        def wrong(*args: Any, **kwargs: Any) -> Any:
            found = function(*args, **kwargs)
            return (found[0] * 1.2, *found[1:]) if isinstance(found, tuple) else found

        return wrong

    def fails(function: Any) -> Any:
        def raises(*_: Any, **__: Any) -> Any:
            raise TorchDynamoException("no Python.h")

        return raises

    compilers = {"passed": lambda function: function, "failed": scaled, "skipped": fails}
    for expected, compiler in compilers.items():
        monkeypatch.setattr(torch, "compile", lambda function, to=compiler, **_: to(function))
        forget_compiled_kernels(monkeypatch)
        found = try_proof("compiled", proofs.compiled)
        assert found.state == expected, found
        assert expected != "passed" or "rms_norm" in found.detail


def forget_compiled_kernels(patch: Patch) -> None:
    for kernel in vars(kernels).values():
        if isinstance(kernel, kernels.Kernel):
            patch.setattr(kernel, "_compiled", None)


def test_a_gpu_that_computes_otherwise(prepared, monkeypatch):
    """There is none here: the CPU takes its place, and then its functions are wrong."""
    proofs = GradientProofs(Subject(prepared("lora").found.config))
    assert try_proof("gpu", proofs.on_gpu).detail == "there is no GPU on this machine."
    monkeypatch.setattr(gradient_proofs, "gpu", lambda: torch.device("cpu"))
    found = try_proof("gpu", proofs.on_gpu)
    assert found.state == "passed" and found.difference is not None
    wrong_softmax_scale(monkeypatch)
    assert try_proof("gpu", proofs.on_gpu).state == "failed"


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_models_are_built_for_the_device_that_is_compared(prepared, monkeypatch, name):
    """On a machine with a GPU the CPU's side has the functions of a CPU."""
    seen = []
    whole = BUILDER.build

    def build(settings: Any) -> Any:
        if settings.get("type") is sft.SupervisedFinetune:
            seen.append(environment.training_device().type)
            environment_of_cpu = environment.training_on(torch.device("cpu"))
            with environment_of_cpu:
                return whole(settings)
        return whole(settings)

    monkeypatch.setattr(subject_module.BUILDER, "build", build)
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *_, **__: module)
    Subject(prepared("lora").found.config).model(torch.device(name))
    assert seen == [name]


@pytest.fixture(scope="module")
def steps(prepared, tmp_path_factory):
    """The one-step runs that are right, which the tests share."""
    runs = prepared("lora").runs(tmp_path_factory.mktemp("steps"))
    with pytest.MonkeyPatch.context() as patch:
        call_in_process(patch)
        return runs.folder, by_name(runs.one_step())


def test_runs_hold(steps):
    _, found = steps
    assert not failures(found), found
    assert 0 < found["ranks"].difference < CLAIMS["ranks"].bound / 10


def mean_of_each_micro_batch(patch: Patch) -> None:
    whole = sft.SupervisedFinetune.compute_loss

    def own_mean(self: Any, data: Any, counts: Any) -> Any:
        return whole(self, data, self.num_items(data))

    patch.setattr(sft.SupervisedFinetune, "compute_loss", own_mean)


def divided_by_the_ranks(patch: Patch) -> None:
    whole = FinetuneOptimWrapper.backward

    def averaged(self: Any, loss: torch.Tensor, **settings: Any) -> None:
        whole(self, loss / get_world_size(), **settings)

    patch.setattr(FinetuneOptimWrapper, "backward", averaged)


def counted_on_one_rank(patch: Patch) -> None:
    patch.setattr(loops, "add_over_ranks", lambda numbers, device: list(numbers))


@pytest.mark.parametrize(
    ("mutate", "name"),
    [
        (mean_of_each_micro_batch, "accumulated"),
        (divided_by_the_ranks, "ranks"),
        (counted_on_one_rank, "ranks"),
    ],
)
def test_runs_fail(prepared, steps, monkeypatch, tmp_path, mutate, name):
    runs = prepared("lora").runs(tmp_path)
    (tmp_path / "one_batch").symlink_to(steps[0] / "one_batch")
    call_in_process(monkeypatch)
    mutate(monkeypatch)
    found = try_proof(name, getattr(runs, name))
    assert found.state == "failed" and found.difference > 1e-2, found


def optimizer_that_does_not_resume(patch: Patch) -> None:
    from xtuner.engine._strategy.strategy import Strategy

    whole = Strategy.restore

    def weights_alone(self: Any, state: Any, model: Any, optim: Any) -> bool:
        kept = {"state": {}, "param_groups": state["optimizer"]["param_groups"]}
        return whole(self, {**state, "optimizer": kept}, model, optim)

    patch.setattr(Strategy, "restore", weights_alone)


def forgotten_random_state(patch: Patch) -> None:
    patch.setattr(loops, "restore_random", lambda runner: None)


def forgotten_data_position(patch: Patch) -> None:
    patch.setattr(loops, "from_batch", lambda loader, done: iter(loader))


def forgotten_schedule(patch: Patch) -> None:
    patch.setattr(run_state, "Restored", lambda *_: Nothing())


class Nothing:
    """Restores no hyper-parameters."""

    def apply(self, *_: Any, **__: Any) -> None:
        """Do nothing."""


RESUME_MUTANTS = [
    optimizer_that_does_not_resume,
    forgotten_random_state,
    forgotten_data_position,
    forgotten_schedule,
]


@pytest.fixture(scope="module")
def whole_run(prepared, tmp_path_factory):
    """The uninterrupted run, which the tests of resuming share."""
    folder = tmp_path_factory.mktemp("whole")
    runs = prepared("lora").runs(folder)
    run_proofs.run_training(runs.config, folder / "whole", run_proofs._without_hooks)
    return folder / "whole"


@pytest.mark.parametrize("mutate", [None, *RESUME_MUTANTS])
def test_resuming(prepared, monkeypatch, tmp_path, whole_run, mutate):
    runs = prepared("lora").runs(tmp_path)
    (tmp_path / "whole").symlink_to(whole_run)
    call_in_process(monkeypatch)
    train = run_proofs.run_training

    def once(config: Path, work_dir: Path, change: Any, **settings: Any) -> list[str]:
        return train(config, work_dir, change, **settings) if settings else []

    monkeypatch.setattr(run_proofs, "run_training", once)
    if mutate is not None:
        mutate(monkeypatch)
    (found,) = runs.resuming()
    assert found.state == ("passed" if mutate is None else "failed"), found
    assert mutate is None or found.difference >= 1


def merge_that_forgets_the_scale(patch: Patch) -> None:
    from peft.tuners.lora import Linear

    patch.setattr(Linear, "get_delta_weight", lambda self, name: self.lora_B[name].weight
                  @ self.lora_A[name].weight)  # fmt: skip


def export_without_a_layer(patch: Patch) -> None:
    from xtuner.export import write_model

    whole = write_model.write_adapter

    def without(llm: Any, weights: Any, *arguments: Any, **settings: Any) -> None:
        name = next(name for name in weights.tensors if "lora_B" in name)
        weights.tensors[name].zero_()
        whole(llm, weights, *arguments, **settings)

    patch.setattr(write_model, "write_adapter", without)


def template_with_another_ending(patch: Patch) -> None:
    from xtuner.export import sidecar_files

    whole = sidecar_files.write_tokenizer

    def other(folder: Path, tokenizer: Any, template: Any) -> Any:
        tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "</s>")
        return whole(folder, tokenizer, template)

    patch.setattr(sidecar_files, "write_tokenizer", other)


def stop_that_is_not_exported(patch: Patch) -> None:
    from xtuner.export import sidecar_files

    def nothing(folder: Path, *_: Any) -> list[int]:
        (folder / "generation_config.json").write_text('{"eos_token_id": 1}', "utf-8")
        return []

    patch.setattr(trained_template, "write_stop_tokens", nothing)
    patch.setattr(sidecar_files, "write_stop_tokens", nothing, raising=False)


@pytest.mark.parametrize(
    ("mutate", "expected"),
    [
        (None, set()),
        (merge_that_forgets_the_scale, {"merged"}),
        (export_without_a_layer, {"exported"}),
        (template_with_another_ending, {"template"}),
        (stop_that_is_not_exported, {"template"}),
    ],
)
def test_exports(prepared, monkeypatch, tmp_path, mutate, expected):
    ready = prepared("lora")
    if mutate is not None:
        mutate(monkeypatch)
    found = ready.exports(tmp_path)
    assert failures(found) == expected, found


def test_the_command(tmp_path, capsys, monkeypatch):
    """A failing proof is the exit status, in JSON and on the page."""
    base, rows = save_base(tmp_path / "base"), save_rows(tmp_path / "rows.jsonl")

    def proofs(config: Path, compile: bool) -> Any:
        off = Proof("plain", "failed", 0.5, 1e-4, "a | b")
        return 6, True, [off, Proof("compiled", "skipped", None, 1e-4, "no compiler")]

    monkeypatch.setattr(prove, "_gradients", proofs)
    for name in ("_steps", "_resumed", "_exports"):
        monkeypatch.setattr(prove, name, lambda *_: [])
    words = ["prove", LORA, "--cfg-options", *options(base, rows)]
    assert main([*words[:2], "--page", str(tmp_path / "page.md"), *words[2:]]) == 1
    said = capsys.readouterr().out
    assert "FAILS" in said and "0 of 1 proofs hold, 1 skipped." in said
    assert "2 of 2 layers" in said and "difference 5.0e-01, bound 1.0e-04" in said
    page = (tmp_path / "page.md").read_text("utf-8")
    assert "| FAILS | fast attention" in page and "a \\| b" in page
    assert main([*words[:2], "--json", *words[2:]]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["holds"] and found["proofs"][0]["difference"] == 0.5


def test_what_cannot_be_tried_is_said():
    def refuses() -> Measured:
        raise Skipped("no such thing")

    def breaks() -> Measured:
        raise KeyError("layer_types")

    assert try_proof("plain", refuses).state == "skipped"
    assert try_proof("plain", breaks).detail == "KeyError: 'layer_types'"
    assert try_proof("plain", lambda: Measured(float("nan"))).state == "failed"
    assert [*itertools.islice(CLAIMS, 1)] == ["plain"]
