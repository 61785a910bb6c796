"""Resuming a run: which checkpoint, and whether it is still the same run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmengine.dist import barrier, broadcast_object_list, get_world_size, is_main_process

from xtuner.checkpoint.checkpoint import (
    checkpoints_of,
    config_beside,
    first_intact,
    load_checkpoint,
    remove_leftovers,
)
from xtuner.checkpoint.fingerprint import RESTART, changes, fingerprints, refuse_changes
from xtuner.checkpoint.run_state import restore
from xtuner.checkpoint.verify import find_corruption_together, require_intact
from xtuner.parallel.sequence.groups import get_data_parallel_world_size
from xtuner.parallel.unwrap import unwrap_model
from xtuner.registry import BUILDER
from xtuner.utils.errors import UserError, Where
from xtuner.utils.files import write_text
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from xtuner.utils.types import Runner

METRICS = "metrics.jsonl"


def checkpoint_to_resume(
    work_dir: str | Path, resume: str | bool | Path, allowed: Collection[str] = ()
) -> Path | None:
    """Choose the checkpoint to resume from; called on every rank.

    Args:
        work_dir: the folder of the run.
        resume: a path, or True for the newest intact checkpoint of ``work_dir``; False for none.
        allowed: with ``restart``, a work dir without a usable checkpoint is a fresh start.

    Returns:
        A file or folder, compared with its manifest by the ranks together; None when there is
        nothing to resume (a fresh start, of which a line is printed).

    Raises:
        UserError: when the path that was asked for does not exist or is damaged, or the work dir
            has checkpoints and none is usable.
    """
    if not resume:
        return None
    if resume is True:
        found, unusable = _newest(Path(work_dir))
        if unusable and RESTART not in allowed:
            raise UserError(
                tr("none of the {count} checkpoints in this folder can be used.", count=unusable),
                hint=tr(
                    "to train from the beginning and overwrite them: '--resume-allow restart'."
                ),
                where=Where(str(work_dir)),
            )
        if found is None and is_main_process():
            print(
                tr("No checkpoint in {work_dir}: starting from the beginning.", work_dir=work_dir)
            )
        return found
    path = Path(resume)
    if path.is_dir() and not path.name.endswith(".pth"):
        found, _ = _newest(path)
        if found is None:
            raise UserError(
                tr("there is no good checkpoint in this folder."),
                hint=_there_is(path),
                where=Where(str(path)),
            )
        return found
    if not path.exists():
        raise UserError(
            tr("there is no such checkpoint."),
            hint=_there_is(path.parent),
            where=Where(str(path)),
        )
    require_intact(path, find_corruption_together)
    return path


def of_run(runner: Runner) -> dict[str, Any]:
    """The fingerprints of a run whose data and model are built."""
    return fingerprints(
        config=runner.cfg,
        dataset=runner.train_dataloader.dataset,
        tokenizer=_tokenizer_of(runner),
        world_size=get_world_size(),
        data_parallel_size=get_data_parallel_world_size(),
    )


def require_progress(state: Mapping[str, Any], checkpoint: str | Path) -> None:
    """Refuse a checkpoint that does not say how many iterations were done.

    Args:
        state: of the checkpoint.
        checkpoint: its path, for the message.

    Raises:
        UserError: when there is no such number.
    """
    meta = state.get("meta")
    done = meta.get("iter") if isinstance(meta, Mapping) else None
    if type(done) is not int or done < 0:
        raise UserError(
            tr("this checkpoint does not say how many iterations its run has done."),
            hint=tr("start anew from its weights: --cfg-options load_from={file}", file=checkpoint),
            where=Where(str(checkpoint), key="meta.iter"),
        )


def resume_run(runner: Runner, checkpoint: str | Path, allowed: Collection[str] = ()) -> None:
    """Put a run that is built where a checkpoint was taken, if it is still the same run.

    Args:
        runner: the runner; its ``fingerprints`` are those of ``of_run``.
        checkpoint: from ``checkpoint_to_resume``, which has verified it.
        allowed: what may have changed, see ``refuse_changes``.

    Raises:
        UserError: when something changed, or the weights do not fit.
    """
    state = load_checkpoint(checkpoint, verify=False)
    require_progress(state, checkpoint)
    before = state["meta"].get("fingerprints", {})
    for line in refuse_changes(changes(before, runner.fingerprints), allowed, checkpoint):
        runner.logger.warning(line)
    restore(runner, state)
    done = runner.train_loop.iter
    if is_main_process():
        truncate_metrics(Path(runner.work_dir) / METRICS, state["meta"]["iter"])
        print(
            tr(
                "Resuming from {checkpoint}: {done} of {max_iters} iterations are done.",
                checkpoint=checkpoint,
                done=done,
                max_iters=runner.max_iters,
            )
        )


def truncate_metrics(metrics: Path, iterations: int) -> None:
    """Drop from ``metrics.jsonl`` what was logged after a checkpoint, as it will be logged again.

    Args:
        metrics: the file; nothing is done when it does not exist.
        iterations: micro-batches done at the checkpoint. A last line that is cut off goes too.
    """
    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.get("iter", 0) <= iterations:
            kept.append(line + "\n")
    write_text(metrics, "".join(kept))


def resume_command(checkpoint: str | Path | None) -> str:
    """The command that continues a run which has been stopped."""
    if checkpoint is None:
        return tr("start the same command again.")
    config = config_beside(checkpoint) or "CONFIG"
    words = ["xtuner", "train", str(config), "--work-dir", str(Path(checkpoint).parent), "--resume"]
    command = shlex.join(words)
    return tr("resume with: {command}", command=command)


def _newest(folder: Path) -> tuple[Path | None, int]:
    """The newest intact checkpoint, and where there is none, how many damaged ones there are.

    Every rank gets the same list and hashes a share of each.
    """
    if is_main_process() and folder.is_dir():
        remove_leftovers(folder)  # and complete what a killed run had written
    barrier()
    listed: list[Any] = [checkpoints_of(folder) if is_main_process() else None]
    broadcast_object_list(listed)
    report = None if is_main_process() else _ignore
    found = first_intact(listed[0], find_corruption_together, report)
    return found, 0 if found else len(listed[0])


def _ignore(line: str) -> None:
    """The first rank has said it."""


def _there_is(folder: Path) -> str:
    """What a user could have meant: the checkpoints that are in a folder."""
    names = sorted(entry.name for entry in folder.glob("*.pth")) if folder.is_dir() else []
    if names:
        return tr("in {folder} there are: {names}.", folder=folder, names=", ".join(names))
    return tr(
        "there are no checkpoints in {folder}; leave '--resume' out to start anew.", folder=folder
    )


def _tokenizer_of(runner: Runner) -> Any:
    """The tokenizer that the data was encoded with; None where the config names none."""
    built = getattr(unwrap_model(runner.model), "tokenizer", None)
    dataset = (runner.cfg.get("train_dataloader") or {}).get("dataset") or {}
    named = built or runner.cfg.get("tokenizer") or dataset.get("tokenizer")
    return BUILDER.build(named) if isinstance(named, Mapping) else named
