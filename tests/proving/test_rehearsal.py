"""Faults that are put in, each found and named with its stage; what is right goes through."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.dataset import DefaultSampler
from safetensors.torch import load_file, save_file

from tests.helpers.tiers import slow
from tests.proving.bases import FULL, LORA, document, options, save_base, save_rows
from xtuner.checkpoint import checkpoint
from xtuner.config.document import ConfigDocument
from xtuner.engine._strategy.strategy import Strategy
from xtuner.engine.hooks import EvaluateChatHook
from xtuner.engine.optim import FinetuneOptimWrapper
from xtuner.engine.runner import loops
from xtuner.engine.runner.finetune_runner import FinetuneRunner
from xtuner.engine.runner.val_loop import ValLoop
from xtuner.entry_point import main
from xtuner.export import trained_template, write_model
from xtuner.model import SupervisedFinetune
from xtuner.proving import fresh
from xtuner.proving import rehearsal as module
from xtuner.proving import rows as rows_module
from xtuner.proving.reduce import Limits
from xtuner.proving.rehearsal import STAGES, Rehearsal, Stage

LIMITS = Limits(rows=6, tokens=64, batch_size=1, accumulative_counts=1, steps=2, new_tokens=2)
Patch = pytest.MonkeyPatch


def stages_of(rehearsal: Rehearsal, first: str = "check") -> dict[str, Stage]:
    return {stage.name: stage for stage in rehearsal.run(first)}


def raising(text: str) -> Callable[..., Any]:
    """A function that fails."""

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError(text)

    return fails


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return save_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture(scope="module")
def done(tmp_path_factory, base, rows):
    """A rehearsal that went well, with LoRA, validation and a test; later faults begin in it."""
    given = document(LORA, [*options(base, rows), "val_size=2"])
    rehearsal = Rehearsal(given, tmp_path_factory.mktemp("done"), LIMITS)
    return rehearsal, stages_of(rehearsal)


def test_what_is_right_goes_through(done):
    rehearsal, stages = done
    assert list(stages) == list(STAGES)
    states = {name: stage.state for name, stage in stages.items()}
    assert states.pop("test") == "skipped"
    assert set(states.values()) == {"ok"}, stages
    assert "2 steps" in stages["train"].detail and "EvaluateChatHook" in stages["hooks"].detail
    assert stages["save"].detail == "iter_1.pth, iter_2.pth"
    assert "left: iter_1.pth" in stages["kill"].detail
    assert rehearsal.needs["parameters"] > 0 and rehearsal.needs["steps"] > 0


@pytest.mark.slow
def test_all_weights_go_through(tmp_path, base, rows):
    """Without an adapter, packing or a chat hook; nothing is merged."""
    words = ["pack_to_max_length=False", "use_varlen_attn=False", "custom_hooks=[]"]
    given = document(FULL, options(base, rows, *words))
    stages = stages_of(Rehearsal(given, tmp_path, LIMITS))
    assert not [stage for stage in stages.values() if stage.state == "failed"]
    skipped = {name for name, stage in stages.items() if stage.state == "skipped"}
    assert skipped == {"validate", "hooks", "merge", "test"}


@dataclass
class Case:
    """A config on its way to a fault."""

    folder: Path
    base: Path
    rows: Path
    patch: Patch
    words: list[str] = field(default_factory=list)

    def own_base(self) -> Path:
        """A copy of the base, which may be damaged."""
        self.base = Path(shutil.copytree(self.base, self.folder / "base"))
        return self.base

    def own_rows(self, text: str) -> None:
        self.rows = self.folder / "rows.jsonl"
        self.rows.write_text(text, "utf-8")

    def document(self) -> ConfigDocument:
        return document(LORA, options(self.base, self.rows, *self.words))


Fault = Callable[[Case], None]
BEFORE: list[tuple[str, str, Fault]] = []
"""Faults that are there from the beginning: stage, words of the cause, how to put it in."""


def before(stage: str, said: str) -> Callable[[Fault], Fault]:
    def keep(fault: Fault) -> Fault:
        BEFORE.append((stage, said, fault))
        return fault

    return keep


@before("check", "model.lora.r")
def an_adapter_of_rank_zero(case: Case) -> None:
    case.words += ["model.lora.r=0"]


@before("check", "missing.jsonl")
def data_that_are_not_there(case: Case) -> None:
    case.rows = case.folder / "missing.jsonl"


@before("check", "none")
def a_template_that_does_not_exist(case: Case) -> None:
    case.words += ["train_dataloader.dataset.template_map_fn.template='none'"]


@before("data", "alpaca")
def a_wrong_map_function(case: Case) -> None:
    case.words += ["train_dataloader.dataset.dataset_map_fn='alpaca_map_fn'"]


@before("data", "rows.jsonl:2")
def a_row_that_is_no_json(case: Case) -> None:
    case.own_rows('{"messages": []}\n{"messages": [\n')


@before("data", "rows")
def a_file_without_rows(case: Case) -> None:
    case.own_rows("")


@before("data", "template")
def a_broken_chat_template(case: Case) -> None:
    (case.own_base() / "chat_template.jinja").write_text("{% for %}", "utf-8")


@before("data", "no row is left")
def rows_without_answers(case: Case) -> None:
    row = {"messages": [{"role": "user", "content": "?"}]}
    case.own_rows(json.dumps(row) + "\n")


@before("data", "tokenizer.json")
def a_missing_tokenizer(case: Case) -> None:
    for file in case.own_base().glob("*token*"):
        file.unlink()


@before("build", "config.json")
def a_missing_config(case: Case) -> None:
    (case.own_base() / "config.json").unlink()


def edit_config(case: Case, **changes: Any) -> None:
    file = case.own_base() / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")


@before("build", "newer transformers")
def an_unknown_architecture(case: Case) -> None:
    edit_config(case, model_type="zorg")


@before("train", "heads")
def heads_that_do_not_divide(case: Case) -> None:
    edit_config(case, num_key_value_heads=3)


@before("build", "all-linear")
def a_wrong_lora_target(case: Case) -> None:
    case.words += ["model.lora.target_modules=['nothing_here']"]


@before("build", "99")
def an_adapter_of_layers_that_are_not_there(case: Case) -> None:
    case.words += ["model.lora.layers_to_transform=[99]", "model.lora.target_modules=['q_proj']"]


@before("train", "vocabulary has 40 entries")
def a_token_without_embedding(case: Case) -> None:
    edit_config(case, vocab_size=40)


@before("train", "collate is broken")
def a_broken_collate_function(case: Case) -> None:
    case.patch.setattr(
        "xtuner.dataset.collate_fns.default_collate_fn", raising("collate is broken")
    )


@pytest.fixture(
    params=[slow(fault) if number % 2 else fault for number, fault in enumerate(BEFORE)],
    ids=lambda fault: fault[2].__name__,
)
def fault(request, tmp_path, base, rows, monkeypatch):
    stage, said, put_in = request.param
    case = Case(tmp_path, base, rows, monkeypatch)
    put_in(case)
    return stage, said, case


def test_faults_of_the_config(fault, tmp_path, monkeypatch):
    stage, said, case = fault
    monkeypatch.setattr(module, "start_fresh", lambda folder: None)
    monkeypatch.setattr(module.stage_work, "plan", lambda document, rows: {})
    (tmp_path / "out").mkdir()
    found = [*Rehearsal(case.document(), tmp_path / "out", LIMITS).run()]
    require_named(found, stage, said)


def require_named(found: list[Stage], stage: str, said: str) -> None:
    """The last stage is the one that fails; it has a cause, and a remedy beside it."""
    last = found[-1]
    print(last)
    assert (last.name, last.state) == (stage, "failed"), found
    assert said in f"{last.cause} {last.remedy}", last
    assert last.cause and last.remedy and last.remedy != last.cause, last


def again(done: tuple[Rehearsal, dict[str, Stage]], folder: Path) -> Rehearsal:
    """A rehearsal that has come as far as ``done``, in a folder of its own."""
    whole, _ = done
    shutil.copytree(whole.folder, folder, ignore=shutil.ignore_patterns("models", "data", "logs"))
    fresh = Rehearsal(whole.document, folder, LIMITS)
    fresh.built, fresh.trained = dict(whole.built), dict(whole.trained)
    return fresh


Late = Callable[[Rehearsal, Patch], None]
LATER: list[tuple[str, str, str, Late]] = []
"""Faults that come later: the stage to begin with, the one that fails, words of the cause."""


def later(first: str, stage: str, said: str) -> Callable[[Late], Late]:
    def keep(fault: Late) -> Late:
        LATER.append((first, stage, said, fault))
        return fault

    return keep


@later("train", "train", "no step")
def an_optimizer_that_fails(rehearsal: Rehearsal, patch: Patch) -> None:
    patch.setattr(FinetuneOptimWrapper, "step", raising("no step"))


@later("train", "train", "loss")
def a_loss_that_is_not_a_number(rehearsal: Rehearsal, patch: Patch) -> None:
    whole = SupervisedFinetune._loss_sum
    patch.setattr(SupervisedFinetune, "_loss_sum", lambda self, data: whole(self, data) * nan)


@later("train", "train", "no order")
def a_sampler_that_fails(rehearsal: Rehearsal, patch: Patch) -> None:
    patch.setattr(DefaultSampler, "__iter__", raising("no order"))


@later("train", "hooks", "EvaluateChatHook.before_train")
def a_hook_that_fails_at_the_start(rehearsal: Rehearsal, patch: Patch) -> None:
    patch.setattr(EvaluateChatHook, "before_train", raising("no question"))


@later("train", "hooks", "EvaluateChatHook.after_train")
def a_hook_that_fails_at_the_end(rehearsal: Rehearsal, patch: Patch) -> None:
    patch.setattr(EvaluateChatHook, "after_train", raising("no question"))


@later("train", "save", "before_save_checkpoint")
def a_hook_that_fails_at_the_save(rehearsal: Rehearsal, patch: Patch) -> None:
    patch.setattr(EvaluateChatHook, "before_save_checkpoint", raising("no"))


@later("train", "save", "disk")
def a_disk_that_is_full(rehearsal: Rehearsal, patch: Patch) -> None:
    patch.setattr(checkpoint.torch, "save", full_disk)


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@later("train", "save", "no checkpoint")
def a_run_that_never_saves(rehearsal: Rehearsal, patch: Patch) -> None:
    patch.setattr(FinetuneRunner, "save_checkpoint", lambda *_, **__: None)


@later("train", "validate", "no metric")
def a_validation_that_fails(rehearsal: Rehearsal, patch: Patch) -> None:
    patch.setattr(ValLoop, "run", raising("no metric"))


@later("resume", "resume", "can be used")
def a_checkpoint_that_is_damaged(rehearsal: Rehearsal, patch: Patch) -> None:
    os.truncate(rehearsal.killed / "iter_1.pth", 100)


@later("resume", "resume", "gone")
def data_that_vanish(rehearsal: Rehearsal, patch: Patch) -> None:
    patch.setattr(rows_module, "load_usable_rows", raising("gone"))


@later("resume", "resume", "data")
def data_that_change(rehearsal: Rehearsal, patch: Patch) -> None:
    whole = rows_module.load_usable_rows

    def others(*arguments: Any) -> tuple[Any, ...]:
        rows, *more = whole(*arguments)
        return rows.select([5, 6, 7, 4]), *more

    patch.setattr(rows_module, "load_usable_rows", others)


@later("resume", "compare", "optimizer")
def an_optimizer_that_does_not_resume(rehearsal: Rehearsal, patch: Patch) -> None:
    whole = Strategy.restore

    def weights_alone(self: Any, state: Any, model: Any, optim: Any) -> bool:
        kept = {"state": {}, "param_groups": state["optimizer"]["param_groups"]}
        return whole(self, {**state, "optimizer": kept}, model, optim)

    patch.setattr(Strategy, "restore", weights_alone)


@later("resume", "compare", "differ")
def dropout_that_begins_anew(rehearsal: Rehearsal, patch: Patch) -> None:
    patch.setattr(loops, "restore_random", lambda runner: None)


@later("convert", "convert", "space")
def a_disk_that_is_full_at_the_export(rehearsal: Rehearsal, patch: Patch) -> None:
    shutil.rmtree(rehearsal.exported)
    patch.setattr(write_model, "write_adapter", full_disk)


@later("convert", "convert", "not those")
def an_export_of_other_weights(rehearsal: Rehearsal, patch: Patch) -> None:
    shutil.rmtree(rehearsal.exported)
    whole = write_model.write_adapter

    def other(llm: Any, weights: Any, out: Path, **settings: Any) -> None:
        whole(llm, weights, out, **settings)
        change(out / "adapter_model.safetensors", torch.ones_like)

    patch.setattr(write_model, "write_adapter", other)


@later("merge", "merge", "adapter_model")
def an_adapter_without_weights(rehearsal: Rehearsal, patch: Patch) -> None:
    shutil.rmtree(rehearsal.merged)
    (rehearsal.exported / "adapter_model.safetensors").unlink()


@later("merge", "merge", "cannot be merged")
def an_adapter_that_is_not_a_number(rehearsal: Rehearsal, patch: Patch) -> None:
    shutil.rmtree(rehearsal.merged)
    change(rehearsal.exported / "adapter_model.safetensors", lambda value: value * nan)


def change(file: Path, how: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change all tensors of a file."""
    tensors = {name: how(value).contiguous() for name, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


@later("load", "load", "config.json")
def a_merged_model_without_config(rehearsal: Rehearsal, patch: Patch) -> None:
    (rehearsal.merged / "config.json").unlink()


@later("load", "load", "other logits")
def a_merged_model_of_other_weights(rehearsal: Rehearsal, patch: Patch) -> None:
    change(rehearsal.merged / "model.safetensors", lambda value: value * 1.1)


@later("load", "load", "other logits")
def an_adapter_of_other_weights(rehearsal: Rehearsal, patch: Patch) -> None:
    change(rehearsal.exported / "adapter_model.safetensors", lambda value: value + 0.1)


@later("load", "load", "cannot load")
def an_adapter_that_peft_does_not_know(rehearsal: Rehearsal, patch: Patch) -> None:
    file = rehearsal.exported / "adapter_config.json"
    file.write_text(file.read_text("utf-8").replace('"LORA"', '"ZORG"'), "utf-8")


@later("load", "generate", "does not stop")
def a_stop_that_is_not_exported(rehearsal: Rehearsal, patch: Patch) -> None:
    (rehearsal.exported / "generation_config.json").write_text('{"eos_token_id": 1}', "utf-8")


@later("load", "generate", "does not generate")
def an_exported_tokenizer_that_is_missing(rehearsal: Rehearsal, patch: Patch) -> None:
    for file in rehearsal.exported.glob("tokenizer*"):
        file.unlink()


@later("load", "generate", "does not generate")
def an_exported_template_that_is_broken(rehearsal: Rehearsal, patch: Patch) -> None:
    (rehearsal.exported / "chat_template.jinja").write_text("{% for %}", "utf-8")


@later("load", "generate", "is no token")
def a_stop_word_that_is_no_token(rehearsal: Rehearsal, patch: Patch) -> None:
    template = {"INSTRUCTION": "{input}", "SUFFIX": "<end>", "SUFFIX_AS_EOS": True}
    patch.setattr(trained_template, "template_of", lambda cfg: template)


@later("test", "test", "NoSuchMetric")
def a_metric_that_does_not_exist(rehearsal: Rehearsal, patch: Patch) -> None:
    config = rehearsal.folder / "with_test.py"
    more = "test_dataloader = train_dataloader\ntest_evaluator = dict(type='NoSuchMetric')\n"
    config.write_text(rehearsal.config.read_text("utf-8") + more + "test_cfg = {}\n", "utf-8")
    rehearsal.built["config"] = str(config)


@pytest.mark.parametrize(
    "late",
    [slow(late) if number % 2 else late for number, late in enumerate(LATER)],
    ids=lambda late: late[3].__name__,
)
def test_faults_of_the_run(done, late, tmp_path, monkeypatch):
    first, stage, said, put_in = late
    rehearsal = again(done, tmp_path / "out")
    if first == "train":
        for folder in (rehearsal.whole, rehearsal.killed):
            shutil.rmtree(folder)
        monkeypatch.setattr(Rehearsal, "begin", lambda *_: None)  # the run beside it fails, too
    if first == "resume":
        for file in rehearsal.killed.glob("iter_2.pth*"):
            file.unlink()
    monkeypatch.setattr(module, "ask", in_a_fork)
    put_in(rehearsal, monkeypatch)
    require_named([*rehearsal.run(first)], stage, said)


def in_a_fork(rehearsal: Rehearsal, request: dict[str, Any]) -> dict[str, Any]:
    """What the fresh process answers, without its imports."""
    answered: dict[str, Any] = rehearsal.call("fresh", fresh.answer, request)
    return answered


def test_there_are_thirty_different_faults():
    """In most stages; 'kill' and 'compare' fail with what they look at."""
    assert len({*(fault for *_, fault in BEFORE), *(fault for *_, fault in LATER)}) >= 30
    hit = {stage for stage, *_ in BEFORE} | {stage for _, stage, *_ in LATER}
    assert set(STAGES) - hit <= {"kill"}


def test_the_command(capsys, monkeypatch, tmp_path, base, rows):
    """Its lines, its exit status, JSON, and that nothing is left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "start_fresh", lambda folder: None)
    words = ["--cfg-options", *options(base, rows), "model.lora.r=0"]
    assert main(["rehearse", LORA, *words]) == 1
    said = capsys.readouterr().out
    assert said.startswith("FAILED   check") and "cause: " in said and "failed after" in said
    assert main(["rehearse", LORA, "--json", *words]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"] and found["stages"][0]["name"] == "check"
    assert [*tmp_path.iterdir()] == []
