"""What the stages of a rehearsal do, each in a child process."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook

from xtuner.config.document import ConfigDocument
from xtuner.config.dump import write_config
from xtuner.config.values import iter_dicts, raw_dict
from xtuner.planning.settings import read_settings
from xtuner.proving import reduce
from xtuner.proving.outcome import differences, metrics, outcome
from xtuner.proving.reduce import Limits
from xtuner.proving.run_proofs import run_training
from xtuner.proving.shrink import ShrunkModel
from xtuner.registry import BUILDER
from xtuner.utils.constants import PREFERENCE_SIDES
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from xtuner.engine.runner.finetune_runner import FinetuneRunner

Told = dict[str, Any]
"""What a stage found, as plain data."""
STAGE = "rehearsal_stage"
"""The attribute of an exception that says which stage it belongs to."""


def prepare_data(document: ConfigDocument, folder: Path, limits: Limits) -> Told:
    """Prepare a sample of the rows at the config's own lengths.

    Raises:
        UserError: when rows cannot be read, mapped or encoded, or nothing of them is trained.
    """
    from xtuner.config.adapt.adapter import RunOptions, adapt

    run = RunOptions(str(folder / "data"))
    whole = adapt(document.editable(), run).config
    document = document.editable()
    reduce.sample_data(raw_dict(document.config), limits.rows)
    config = adapt(document, run).config
    dataset: Any = BUILDER.build(config.train_dataloader.dataset)
    rows = [dict(dataset[number]) for number in range(len(dataset))]
    rows = [part for row in rows for part in _samples(row)]
    if not rows:
        raise UserError(
            tr("no row is left to train on."),
            hint=tr("'xtuner check-custom-dataset CONFIG' says why each row is left out."),
            where=_dataset_key(document),
        )
    labels = [label for row in rows for name in _LABELS for label in row.get(name, ())]
    supervised = sum(label >= 0 for label in labels)
    if labels and not supervised:
        raise UserError(
            tr("no token of the sample has a loss: no answer is found in it."),
            hint=tr("'xtuner log-dataset CONFIG' shows which tokens are trained."),
            where=_dataset_key(document),
        )
    lengths = [len(row[name]) for row in rows for name in _IDS if name in row]
    if config.get("val_dataloader"):
        BUILDER.build(config.val_dataloader.dataset)
    return {
        "rows": len(rows),
        "longest": max(lengths, default=0),
        "supervised": supervised,
        "estimated": _estimated_rows(whole, limits.rows, len(rows), sum(lengths)),
    }


def _estimated_rows(config: Config, sampled: int, built: int, tokens: int) -> int | None:
    """Rows of the whole dataset, packed where they are packed; None where they are not known.

    Args:
        config: of the real run.
        sampled: rows of the sample.
        built: what became of them.
        tokens: in them.
    """
    values = raw_dict(config)
    rows = reduce.rows_in_all(values)
    if not rows:
        return None
    loader = values["train_dataloader"]
    packed = any(part.get("pack_to_max_length") for _, part in iter_dicts(loader))
    share = tokens / read_settings(config, 1).length if packed else built
    return max(1, round(rows * share / min(rows, sampled)))


def _samples(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A row, or the two samples of a pair of answers about images."""
    return [row[side] for side in PREFERENCE_SIDES if side in row] or [row]


_IDS = ("input_ids", "chosen_ids", "rejected_ids")
_LABELS = ("labels", "chosen_labels", "rejected_labels")


def _dataset_key(document: ConfigDocument) -> Where:
    return Where(document.file, key="train_dataloader.dataset")


def build(document: ConfigDocument, folder: Path, limits: Limits) -> Told:
    """Write the small model and the config of the rehearsal, and build its model.

    Raises:
        UserError: when there is no ``config.json``, or the model or its adapter cannot be built.
    """
    document = document.editable()
    values = raw_dict(document.config)
    base = next((owner.path for _, owner in reduce.owners(values["model"])), None)
    models: list[ShrunkModel] = reduce.shrink_models(values, document.file, folder / "models")
    changes = reduce.use_float32(values)
    changes += reduce.run_alone(values)
    changes += reduce.sample_data(values, limits.rows)
    changes += reduce.shorten(values, limits.tokens)
    changes += reduce.few_steps(values, limits)
    randomness = values.get("randomness") or {}
    if randomness.get("seed") is None:
        values["randomness"] = {**randomness, "seed": 0}
    config = folder / f"{document.name}.py"
    write_config(document, config)
    built: Any = BUILDER.build(_adapted(config, folder).model)
    trained = sum(weight.numel() for weight in built.parameters() if weight.requires_grad)
    if not trained:
        raise UserError(
            tr("nothing of the model is trained: all its parameters are frozen."),
            hint=tr("add an adapter (lora), or train a part: see freeze_... in model."),
            where=Where(document.file, key="model"),
        )
    return {
        "config": str(config),
        "base": str(models[0].folder) if models else base,
        "models": [str(model) for model in models],
        "modules": [model.module for model in models],
        "trained": trained,
        "total": sum(weight.numel() for weight in built.parameters()),
        "changes": reduce.lines_of(changes),
        "quantized": bool(getattr(getattr(built, "causal_lm", None), "is_quantized", False)),
        "supervised": hasattr(built, "causal_lm") and not hasattr(built, "v_head"),
        "has_adapter": bool(getattr(built, "has_adapter", False)),
        "class": type(getattr(built, "causal_lm", built)).__name__,
        "trusted": reduce.trusts_code(document.values),
    }


def _adapted(config: Path, folder: Path) -> Config:
    from xtuner.config.adapt.adapter import RunOptions, adapt
    from xtuner.config.load import load

    return adapt(load(str(config)), RunOptions(str(folder / "run"))).config


def _unchanged(config: Config) -> None:
    """Leave a config as it is."""


def train(config: Path, work_dir: Path, *, resume: bool = False, kill_after: int = 0) -> Told:
    """Train a few steps; a failure says in which stage of the rehearsal it was.

    Args:
        config: of the rehearsal.
        work_dir: of the run.
        resume: continue from its newest checkpoint.
        kill_after: end the process by SIGKILL after so many micro-batches; 0: do not.

    Raises:
        UserError: of a hook that failed, or of anything else.
    """

    validates = False

    def watch(runner: Any) -> None:
        nonlocal validates
        runner.save_checkpoint = tagged("save", runner.save_checkpoint)
        if runner.val_loop is not None:
            validates = True
            runner.val_loop.run = tagged("validate", runner.val_loop.run)
        if kill_after:
            runner.register_hook(KillHook(kill_after), priority="VERY_LOW")

    failed = run_training(config, work_dir, _unchanged, resume=resume, before=watch)
    if failed:
        name = failed[0].partition(":")[0]
        error = UserError(
            tr("a hook failed: {failed}", failed="; ".join(dict.fromkeys(failed))),
            hint=tr("fix {name}, or take it out of the config.", name=name.partition(".")[0]),
        )
        error.__dict__[STAGE] = "save" if "checkpoint" in name else "hooks"
        raise error
    logged = [line for line in metrics(work_dir) if "loss" in line]
    names = sorted(file.name for file in work_dir.glob("*.pth"))
    if not names:
        error = UserError(
            tr("the run wrote no checkpoint."),
            hint=reduce.needs_checkpoint_hook(),
        )
        error.__dict__[STAGE] = "save"
        raise error
    return {
        "losses": [line["loss"] for line in logged],
        "validates": validates,
        "validated": [line for line in metrics(work_dir) if _is_validation(line)],
        "checkpoints": names,
        "hooks": hook_names(config),
    }


def _is_validation(line: Mapping[str, Any]) -> bool:
    return any(key.startswith(("val", "eval")) for key in line)


def hook_names(config: Path) -> list[str]:
    """The names of a config's own hooks."""
    from xtuner.config.load import load
    from xtuner.config.values import name_of

    hooks = raw_dict(load(str(config)).config).get("custom_hooks") or []
    return [name_of(dict.get(hook, "type")) for hook in hooks]


def tagged(stage: str, work: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose errors say which stage they belong to."""

    @functools.wraps(work)
    def call(*arguments: object, **settings: object) -> Any:
        try:
            return work(*arguments, **settings)
        except Exception as error:
            error.__dict__.setdefault(STAGE, stage)
            raise

    return call


class KillHook(Hook):
    """Ends the process as ``kill -9`` does, before a micro-batch."""

    def __init__(self, after: int) -> None:
        self.after = after

    def before_train_iter(self, runner: FinetuneRunner, *_: object, **__: object) -> None:
        """Count."""
        if runner.iter >= self.after:
            os.kill(os.getpid(), signal.SIGKILL)


def compare_runs(whole: Path, resumed: Path) -> Told:
    """Compare what two runs left, to the bit.

    Raises:
        UserError: naming what differs.
    """
    found = list(differences(outcome(whole), outcome(resumed)))
    if found:
        kinds = sorted({path.lstrip(".").partition(".")[0].partition("[")[0] for path in found})
        raise UserError(
            tr(
                "the resumed run ends elsewhere than the uninterrupted one: {kinds} differ "
                "({count} places, such as {first}).",
                kinds=", ".join(kinds),
                count=len(found),
                first=found[0],
            ),
            hint=tr(
                "something of the run draws random numbers of its own, or keeps a state that is "
                "not saved: a hook, an optimizer, a sampler or a map function of your own."
            ),
        )
    return {}


def save_expected(config: Path, checkpoint: Path, file: Path, ids: list[list[int]]) -> Told:
    """Write the logits of the trained model.

    Args:
        config: of the rehearsal.
        checkpoint: of the trained weights.
        file: to be written.
        ids: (B, S) token ids.
    """
    from safetensors.torch import save_file

    from xtuner.checkpoint.checkpoint import load_state_dict
    from xtuner.export.verify import compute_logits

    settings = _adapted(config, checkpoint.parent).model
    model: Any = BUILDER.build(ConfigDict({**settings, "use_activation_checkpointing": False}))
    model.load_state_dict(load_state_dict(checkpoint), strict=False)
    logits = compute_logits(model.llm, torch.tensor(ids))
    save_file({"logits": logits.contiguous()}, file)
    return {}


def expected_stops(config: Path, folder: Path) -> Told:
    """Where answers end in training, and whether the exported folder says so.

    Raises:
        UserError: for a stop that the folder lacks, or that is no token.
    """
    from xtuner.export.trained_template import processor_of, template_of, uses_own_template
    from xtuner.proving.export_proofs import exported_stops
    from xtuner.tokenization.chat_template import answer_stops

    cfg = _adapted(config, config.parent)
    tokenizer = reduce.tokenizer_of(cfg)
    template = template_of(cfg)
    is_own = uses_own_template(cfg) or processor_of(cfg) is not None
    if tokenizer is None or (template is None and not is_own):
        return {"stops": []}
    ids, texts = answer_stops(tokenizer, template)
    ends = template is not None and template.get("SUFFIX_AS_EOS")
    suffix = template["SUFFIX"].strip() if template is not None and ends else ""
    if suffix in texts:
        raise UserError(
            tr(
                "the template ends answers with {suffix!r}, which is no token of this tokenizer.",
                suffix=suffix,
            ),
            hint=tr("use the template of this model's family, or PROMPT_TEMPLATE.auto."),
            where=Where(key="prompt_template"),
        )
    saved = exported_stops(folder) or [tokenizer.eos_token_id]
    missing = [number for number in ids if number not in saved]
    if missing:
        raise UserError(
            tr(
                "answers end with {names} in training, at which the exported model does not stop "
                "(generation_config.json: {saved}).",
                names=", ".join(map(repr, tokenizer.convert_ids_to_tokens(missing))),
                saved=saved,
            ),
            hint=tr("add them to eos_token_id in generation_config.json of the exported folder."),
            where=Where(str(folder)),
        )
    return {"stops": ids}


def expected_stops_or_error(config: Path, folder: Path) -> Told:
    """``expected_stops``; its error as ``cause`` and ``remedy``, for the stage that generates."""
    try:
        return expected_stops(config, folder)
    except UserError as error:
        return {"cause": str(error).partition("\n")[0], "remedy": error.hint}


def test(config: Path, checkpoint: Path, work_dir: Path) -> Told:
    """Run ``xtuner test``."""
    from xtuner.proving.export_proofs import run_command

    words = [str(config), "--checkpoint", str(checkpoint), "--work-dir", str(work_dir)]
    run_command("test", *words)
    return {}


def plan(document: ConfigDocument, rows: int | None) -> Told:
    """What the real run will need.

    Args:
        document: its config.
        rows: of its dataset, packed where they are packed; None: not known.
    """
    from xtuner.planning.plan import Machine, Planner

    found = Planner(rows).plan(document, Machine())
    return {
        "memory": found.memory.total,
        "parameters": found.sizes.count,
        "trained": found.sizes.trained_count,
        "steps": found.schedule.steps,
        "checkpoint": found.schedule.checkpoint,
        "kept": found.schedule.checkpoints,
        "tokens": found.settings.tokens,
    }
