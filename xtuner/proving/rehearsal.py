"""``xtuner rehearse``: the whole life of a run in a minute, with a small model of its class.

Each stage is a child process. The first failure ends the rehearsal; it has the name of its stage,
a cause and a remedy. Everything is written into a folder of the rehearsal's own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from xtuner.config.document import ConfigDocument
from xtuner.proving import children, stage_work
from xtuner.proving.children import Child, Ended
from xtuner.proving.reduce import Limits, needs_checkpoint_hook, require_runner
from xtuner.utils.errors import UserError
from xtuner.utils.lang import N_, tr, translate

LIMITS = Limits(rows=16, tokens=256, batch_size=2, accumulative_counts=2, steps=4)
SAME = 1e-3
"""Largest relative difference of logits of an exported model, in float32."""
QUESTION_TOKENS = 32
State = Literal["ok", "failed", "skipped"]


class Skipped(Exception):
    """A stage has nothing to do here; its text says why."""


@dataclass(frozen=True)
class Stage:
    """What came of a stage.

    Attributes:
        name: a key of ``STAGES``.
        state: whether it went well.
        seconds: how long it took.
        detail: what was seen, or why it was skipped.
        cause: why it failed.
        remedy: what to do.
    """

    name: str
    state: State
    seconds: float
    detail: str = ""
    cause: str = ""
    remedy: str = ""

    @property
    def title(self) -> str:
        """The stage in the user's language."""
        return translate(TITLES[self.name])


TITLES = {
    "check": N_("check"),
    "data": N_("data"),
    "build": N_("build"),
    "train": N_("train"),
    "validate": N_("validate"),
    "hooks": N_("hooks"),
    "save": N_("save"),
    "kill": N_("kill"),
    "resume": N_("resume"),
    "compare": N_("compare"),
    "convert": N_("convert"),
    "merge": N_("merge"),
    "load": N_("load"),
    "generate": N_("generate"),
    "test": N_("test"),
}
"""All stages, in their order."""


@dataclass
class Rehearsal:
    """A rehearsal and what its stages have found.

    Args:
        document: a loaded config, overrides applied.
        folder: an empty folder for everything that is written.
        limits: sizes of the small run.
    """

    document: ConfigDocument
    folder: Path
    limits: Limits = LIMITS
    built: dict[str, Any] = field(default_factory=dict)
    trained: dict[str, Any] = field(default_factory=dict)
    loaded: dict[str, Any] = field(default_factory=dict)
    needs: dict[str, Any] = field(default_factory=dict)
    _group: children.Group = field(default_factory=children.Group)
    _ahead: dict[str, Child] = field(default_factory=dict)
    _planned: Child | None = None
    _fresh: subprocess.Popen[str] | None = None

    @property
    def config(self) -> Path:
        return Path(self.built["config"])

    @property
    def whole(self) -> Path:
        """The work dir of the uninterrupted run."""
        return self.folder / "run"

    @property
    def killed(self) -> Path:
        """The work dir of the run that is killed and resumed."""
        return self.folder / "killed"

    @property
    def exported(self) -> Path:
        return self.folder / "exported"

    @property
    def merged(self) -> Path:
        return self.folder / "merged"

    def run(self, first: str = "check") -> Iterator[Stage]:
        """Go through the stages, from one on, to the end or the first failure.

        Args:
            first: where to begin; what comes before has been done.
        """
        names = list(STAGES)
        with self._group:
            try:
                for name in names[names.index(first) :]:
                    stage = self._try(name, STAGES[name])
                    yield stage
                    if stage.state == "failed":
                        return
                self._read_plan()
            finally:
                if self._fresh is not None:
                    self._fresh.kill()
                    self._fresh.wait()

    def _try(self, name: str, work: Callable[[Rehearsal], str]) -> Stage:
        began = time.perf_counter()
        try:
            detail = work(self)
        except Skipped as reason:
            return Stage(name, "skipped", time.perf_counter() - began, str(reason))
        except UserError as error:
            owner = error.__dict__.get(stage_work.STAGE, name)
            place = f"{error.where}: " if error.where and str(error.where) else ""
            cause, remedy = place + error.message, error.hint or remedy_of(name)
            return Stage(owner, "failed", time.perf_counter() - began, "", cause, remedy)
        return Stage(name, "ok", time.perf_counter() - began, detail)

    def call(self, name: str, work: Callable[..., Any], *arguments: object) -> Any:
        """Call a function in a child; its log has the name of the stage."""
        child = self._ahead.pop(name, None) or self.start(name, work, *arguments)
        return child.result()

    def begin(self, name: str, work: Callable[..., Any], *arguments: object) -> None:
        """Start what a later stage waits for."""
        self._ahead[name] = self.start(name, work, *arguments)

    def start(self, name: str, work: Callable[..., Any], *arguments: object) -> Child:
        """Start a function in a child."""
        return self._group.start(work, *arguments, log=self.folder / "logs" / f"{name}.log")

    def _read_plan(self) -> None:
        """Take what the real run will need, unless no plan could be made."""
        if self._planned is not None:
            self.needs = self._planned.wait().value or {}


def remedy_of(name: str) -> str:
    """What to do where an error does not say it: the command that examines this part.

    Args:
        name: of the stage that was at work.
    """
    if name == "check":
        return tr("'xtuner check-cfg CONFIG' lists everything that is wrong with the config.")
    if name == "data":
        return tr("'xtuner check-custom-dataset CONFIG' examines every row.")
    log = "fresh" if name in ("load", "generate") else name
    return tr("its whole output is in logs/{name}.log of --keep FOLDER.", name=log)


def check(rehearsal: Rehearsal) -> str:
    """The config's rules, its settings together, its files."""
    from xtuner.config.adapt.adapter import RunOptions, adapt
    from xtuner.config.check.checker import check_or_raise
    from xtuner.config.check.data_files import require_data_files
    from xtuner.config.check.problem import Context

    document = rehearsal.document
    check_or_raise(document)
    require_runner(document, "rehearse")
    require_data_files(Context(document), document.file)
    adapt(document, RunOptions(str(rehearsal.folder / "adapted")))
    children.preload()
    rehearsal._fresh = start_fresh(rehearsal.folder)
    return tr("no errors")


def data(rehearsal: Rehearsal) -> str:
    """A sample of the rows at the config's own lengths."""
    arguments = (rehearsal.document, rehearsal.folder, rehearsal.limits)
    found = rehearsal.call("data", stage_work.prepare_data, *arguments)
    rows = found["estimated"]
    rehearsal._planned = rehearsal.start("plan", stage_work.plan, rehearsal.document, rows)
    return tr(
        "{rows} rows, the longest of {longest:,} tokens, {supervised:,} tokens with loss",
        rows=found["rows"],
        longest=found["longest"],
        supervised=found["supervised"],
    )


def build(rehearsal: Rehearsal) -> str:
    """The small model with its adapter and quantisation."""
    arguments = (rehearsal.document, rehearsal.folder, rehearsal.limits)
    rehearsal.built = rehearsal.call("build", stage_work.build, *arguments)
    known = [name for name in rehearsal.built["modules"] if name.startswith(_LIBRARIES)]
    children.preload(*known)
    what = "; ".join(rehearsal.built["models"]) or tr("the model that the config makes")
    return tr(
        "{what}; {trained:,} of {total:,} trained",
        what=what,
        trained=rehearsal.built["trained"],
        total=rehearsal.built["total"],
    )


_LIBRARIES = ("transformers.models.", "xtuner.")
"""Modules of models that may be imported: no code of a model's folder."""


def train(rehearsal: Rehearsal) -> str:
    """A few steps; beside it the run that is killed."""
    config, counts = rehearsal.config, rehearsal.limits.steps
    step = _micro_batches(config)
    after = step * (counts - 1)
    killed = (config, rehearsal.killed, False, after)
    rehearsal.begin("kill", _train_tagged, *killed)
    found = rehearsal.call("train", _train_tagged, config, rehearsal.whole, False, 0)
    rehearsal.trained = _told(found)
    losses = rehearsal.trained["losses"]
    return tr(
        "{steps} steps, loss {first:.3f} to {last:.3f}",
        steps=counts,
        first=losses[0],
        last=losses[-1],
    )


def _micro_batches(config: Path) -> int:
    """Of an optimizer step."""
    from xtuner.config.load import load

    wrapper = load(str(config)).values.get("optim_wrapper") or {}
    return int(dict.get(wrapper, "accumulative_counts") or 1)


def _train_tagged(config: Path, work_dir: Path, resume: bool, kill_after: int) -> dict[str, Any]:
    """``stage_work.train``, whose error comes back with its stage."""
    from xtuner.library_errors import one_line
    from xtuner.library_errors import translate as as_user_error

    try:
        return stage_work.train(config, work_dir, resume=resume, kill_after=kill_after)
    except Exception as error:
        import traceback

        traceback.print_exc()
        known = as_user_error(error) or UserError(one_line(error))
        place = f"{known.where}: " if known.where and str(known.where) else ""
        stage = error.__dict__.get(stage_work.STAGE)
        return {"stage": stage, "cause": place + known.message, "remedy": known.hint}


def _told(found: dict[str, Any]) -> dict[str, Any]:
    """What a training told.

    Raises:
        UserError: that it failed with.
    """
    if "cause" not in found:
        return found
    error = UserError(found["cause"], hint=found["remedy"])
    if found["stage"]:
        error.__dict__[stage_work.STAGE] = found["stage"]
    raise error


def validate(rehearsal: Rehearsal) -> str:
    """The validation that was part of the training."""
    if not rehearsal.trained["validates"]:
        raise Skipped(tr("the config has no validation."))
    lines = rehearsal.trained["validated"]
    if not lines:
        raise UserError(
            tr("the training did not validate."),
            hint=tr("see {setting} in the config.", setting="train_cfg.val_interval"),
        )
    shown = {key: value for key, value in lines[-1].items() if isinstance(value, float)}
    return ", ".join(f"{key} {value:.3f}" for key, value in shown.items())


def hooks(rehearsal: Rehearsal) -> str:
    """The config's hooks, which ran with the training."""
    names = rehearsal.trained["hooks"]
    if not names:
        raise Skipped(tr("the config has no custom_hooks."))
    return ", ".join(names)


def save(rehearsal: Rehearsal) -> str:
    """The checkpoints that the training wrote."""
    return ", ".join(rehearsal.trained["checkpoints"])


def kill(rehearsal: Rehearsal) -> str:
    """The run beside the training, ended by SIGKILL."""
    ended: Ended = rehearsal._ahead.pop("kill").wait()
    if ended.killed != signal.SIGKILL:
        _told(ended.value or {})
        raise ended.error or UserError(tr("the run ended before it could be killed."))
    names = sorted(file.name for file in rehearsal.killed.glob("*.pth"))
    if not names:
        raise UserError(
            tr("the killed run left no checkpoint."),
            hint=needs_checkpoint_hook(),
        )
    rehearsal.begin("resume", *_resuming(rehearsal))
    rehearsal.begin("convert", *_converting(rehearsal))
    return tr(
        "after step {step}; left: {names}", step=rehearsal.limits.steps - 1, names=", ".join(names)
    )


def resume(rehearsal: Rehearsal) -> str:
    """The killed run, resumed and trained to its end."""
    found = _told(rehearsal.call("resume", *_resuming(rehearsal)))
    return tr(
        "to step {step}, loss {last:.3f}", step=rehearsal.limits.steps, last=found["losses"][-1]
    )


def _resuming(rehearsal: Rehearsal) -> tuple[Any, ...]:
    return (_train_tagged, rehearsal.config, rehearsal.killed, True, 0)


def compare(rehearsal: Rehearsal) -> str:
    """Both runs' weights, optimizers, schedules, random states and losses."""
    rehearsal.call("compare", stage_work.compare_runs, rehearsal.whole, rehearsal.killed)
    return tr("resumed and uninterrupted are equal to the bit")


def last_checkpoint(work_dir: Path) -> Path:
    """The newest checkpoint of a finished run."""
    return max(work_dir.glob("*.pth"), key=lambda file: int(file.stem.rpartition("_")[2]))


def convert(rehearsal: Rehearsal) -> str:
    """``xtuner convert pth_to_hf``, with its own verification."""
    rehearsal.call("convert", *_converting(rehearsal))
    files = sorted(file.name for file in rehearsal.exported.glob("*.safetensors"))
    return ", ".join(files)


def _converting(rehearsal: Rehearsal) -> tuple[Any, ...]:
    from xtuner.proving.export_proofs import run_command

    checkpoint = last_checkpoint(rehearsal.whole)
    words = (str(rehearsal.config), str(checkpoint), str(rehearsal.exported))
    return (run_command, "convert", "pth_to_hf", *words)


def merge(rehearsal: Rehearsal) -> str:
    """``xtuner convert merge``."""
    from xtuner.proving.export_proofs import run_command

    if not (rehearsal.exported / "adapter_config.json").is_file():
        raise Skipped(tr("all weights are trained: there is no adapter."))
    folders = (rehearsal.built["base"], str(rehearsal.exported), str(rehearsal.merged))
    rehearsal.call("merge", run_command, "convert", "merge", *folders)
    return tr(
        "base and adapter in {count} files", count=len(list(rehearsal.merged.glob("*.safetensors")))
    )


def load(rehearsal: Rehearsal) -> str:
    """The exported model by transformers and peft alone, in a fresh process."""
    if not rehearsal.built["supervised"] or not rehearsal.built["base"]:
        raise Skipped(tr("this is no language model; 'convert' has verified what it wrote."))
    found = ask_fresh(rehearsal)
    if found.get("step") == "load":
        raise UserError(
            tr(
                "transformers and peft cannot load what was exported: {error}",
                error=found["error"],
            ),
            hint=tr("its traceback is in logs/{name} of --keep FOLDER", name="fresh.log"),
        )
    rehearsal.loaded = found
    if "differences" not in found:
        return tr("loaded")
    wrong = {name: off for name, off in found["differences"].items() if not off <= SAME}
    if wrong:
        shown = ", ".join(f"{name} {off:.1e}" for name, off in wrong.items())
        raise UserError(
            tr(
                "the loaded model computes other logits (relative difference: {shown}).",
                shown=shown,
            ),
            hint=tr("'xtuner prove CONFIG' finds which step of the export changes them."),
        )
    shown = ", ".join(f"{off:.0e}" for off in found["differences"].values())
    return tr("logits differ by {shown} at most", shown=shown)


def ask_fresh(rehearsal: Rehearsal) -> dict[str, Any]:
    """Hand the exported model to the fresh process, and give its answer."""
    from xtuner.proving.shrink import read_json

    adapter = (rehearsal.exported / "adapter_config.json").is_file()
    base = Path(rehearsal.built["base"]) if adapter else rehearsal.exported
    ids = [[n % 97 + 5 for n in range(QUESTION_TOKENS)]]
    expected = rehearsal.folder / "expected.safetensors"
    if not rehearsal.built["quantized"]:
        arguments = (rehearsal.config, last_checkpoint(rehearsal.whole), expected, ids)
        rehearsal.call("expected", stage_work.save_expected, *arguments)
    stops = rehearsal.call(
        "stops", stage_work.expected_stops_or_error, rehearsal.config, rehearsal.exported
    )
    rehearsal.loaded = {"stops": stops}
    request = {
        "base": str(base),
        "adapter": str(rehearsal.exported) if adapter else None,
        "merged": str(rehearsal.merged) if adapter else None,
        "tokenizer": str(rehearsal.exported),
        "expected": None if rehearsal.built["quantized"] else str(expected),
        "ids": ids,
        "stops": stops.get("stops", []),
        "new_tokens": rehearsal.limits.new_tokens,
        "question": "What is this?",
        "class": rehearsal.built["class"],
        "trusted": rehearsal.built["trusted"],
        "own_classes": is_own_family(read_json(base / "config.json").get("model_type")),
    }
    return {**ask(rehearsal, request), "stops": stops}


def ask(rehearsal: Rehearsal, request: dict[str, Any]) -> dict[str, Any]:
    """Hand a request to the fresh process."""
    if rehearsal._fresh is None:
        rehearsal._fresh = start_fresh(rehearsal.folder)
    said, _ = rehearsal._fresh.communicate(json.dumps(request) + "\n")
    rehearsal._fresh = None
    try:
        found: dict[str, Any] = json.loads(said.splitlines()[-1])
    except (IndexError, ValueError):
        return {"step": "load", "error": tr("the process ended without an answer")}
    return found


def is_own_family(model_type: object) -> bool:
    """Whether transformers has no class for a model."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type not in CONFIG_MAPPING_NAMES


def start_fresh(folder: Path) -> subprocess.Popen[str]:
    """Start the process that loads the exported model; it imports while the others train."""
    (folder / "logs").mkdir(exist_ok=True)
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    with (folder / "logs" / "fresh.log").open("w", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "xtuner.proving.fresh"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        )


def generate(rehearsal: Rehearsal) -> str:
    """A short answer; generation ends at each token that ends an answer in training."""
    found = rehearsal.loaded
    if not found:
        raise Skipped(tr("nothing was loaded."))
    stops = found["stops"]
    if "cause" in stops:
        raise UserError(stops["cause"], hint=stops["remedy"])
    if found.get("step") == "generate":
        raise UserError(tr("the loaded model does not generate: {error}", error=found["error"]))
    if found["missed"]:
        raise UserError(
            tr("generation does not end at the tokens {missed}.", missed=found["missed"]),
            hint=tr("see eos_token_id in generation_config.json of the exported folder."),
        )
    return tr(
        "{tokens} tokens; ends at {count} stop tokens",
        tokens=found["tokens"],
        count=len(stops["stops"]),
    )


def test(rehearsal: Rehearsal) -> str:
    """``xtuner test``, where the config has test data."""
    from xtuner.config.load import load as load_config

    if load_config(str(rehearsal.config)).values.get("test_dataloader") is None:
        raise Skipped(tr("the config has no test_dataloader."))
    checkpoint, out = last_checkpoint(rehearsal.whole), rehearsal.folder / "test"
    rehearsal.call("test", stage_work.test, rehearsal.config, checkpoint, out)
    results = json.loads((out / "results.json").read_text("utf-8"))
    return ", ".join(f"{key} {value}" for key, value in list(results.items())[:3])


STAGES: dict[str, Callable[[Rehearsal], str]] = {
    "check": check,
    "data": data,
    "build": build,
    "train": train,
    "validate": validate,
    "hooks": hooks,
    "save": save,
    "kill": kill,
    "resume": resume,
    "compare": compare,
    "convert": convert,
    "merge": merge,
    "load": load,
    "generate": generate,
    "test": test,
}
"""The work of each stage, in their order."""
