"""Adapting a config to a run: command-line settings, today's libraries, this machine, a strategy.

Every change that a user should know of is noted. After this the config is written out and does not
change any more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from xtuner.config.adapt.machine import adapt_to_machine
from xtuner.config.adapt.strategy import adapt_strategy
from xtuner.config.adapt.validation import adapt_validation_split
from xtuner.config.compat import adapt_published
from xtuner.config.document import ConfigDocument


@dataclass(frozen=True)
class RunOptions:
    """What the command line says about a run, beside the config.

    Attributes:
        work_dir: where everything goes; the config's, else ``work_dirs/<config name>``.
        launcher: who started the processes: none, pytorch, slurm or mpi.
        seed: the random seed; the config's when None.
        deepspeed: a DeepSpeed config, by path or name.
        fsdp: shard the model with FSDP.
        fsdp_offload: keep the shards of FSDP in main memory.
    """

    work_dir: str | None = None
    launcher: str = "none"
    seed: int | None = None
    deepspeed: str | None = None
    fsdp: bool = False
    fsdp_offload: bool = False


def adapt(document: ConfigDocument, run: RunOptions) -> ConfigDocument:
    """Adapt a checked config to a run.

    Args:
        document: a loaded config, overrides applied.
        run: what the command line says.

    Returns:
        The document with the values that the run uses, and notes on what was changed.

    Raises:
        UserError: for settings that contradict each other.
    """
    document = document.editable()
    config = document.config
    config.work_dir = run.work_dir or config.get("work_dir") or f"./work_dirs/{document.name}"
    config.launcher = run.launcher
    if run.seed is not None:
        config.randomness = {**(config.get("randomness") or {}), "seed": run.seed}
    notes = adapt_published(config)
    notes += adapt_validation_split(config)
    notes += adapt_to_machine(config, launcher=run.launcher)
    fsdp = run.fsdp or run.fsdp_offload
    notes += adapt_strategy(config, deepspeed=run.deepspeed, fsdp=fsdp, offload=run.fsdp_offload)
    return replace(document, notes=(*document.notes, *notes))
