"""All proofs of a config, in child processes: what ``xtuner prove`` shows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from xtuner.config.document import ConfigDocument
from xtuner.config.dump import write_config
from xtuner.config.values import raw_dict
from xtuner.proving import children, reduce
from xtuner.proving.proof import Proof
from xtuner.proving.reduce import Limits
from xtuner.proving.shrink import ShrunkModel
from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr

LIMITS = Limits(rows=6, tokens=256, batch_size=2, accumulative_counts=2, steps=4)


@dataclass
class Report:
    """What was proved.

    Attributes:
        proofs: in the order of ``CLAIMS``.
        models: the small models; empty for the whole one.
        changes: what differs from the real run.
    """

    proofs: list[Proof] = field(default_factory=list)
    models: list[ShrunkModel] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether no proof failed."""
        return all(proof.state != "failed" for proof in self.proofs)


@dataclass(frozen=True)
class Prepared:
    """A config written for proofs, as plain data that a process can send.

    Attributes:
        config: the file.
        base: the folder of the language model; None where the config makes its own.
        models: the small models.
        changes: what differs from the real run.
        modules: of the models' classes.
    """

    config: Path
    base: Path | None
    models: list[ShrunkModel]
    changes: list[str]
    modules: list[str]


def prove_config(
    document: ConfigDocument,
    folder: Path,
    *,
    full: bool = False,
    compile: bool = False,
    show: Callable[[Sequence[Proof]], None] = lambda proofs: None,
) -> Report:
    """Prove a config; all computation is in child processes.

    Args:
        document: a checked config.
        folder: an empty folder for everything that is written.
        full: take the whole model, with its weights.
        compile: prove the compiled model, too.
        show: called with the proofs of each group as they are done.

    Raises:
        UserError: when the model cannot be made, or its data cannot be prepared.
    """
    reduce.require_runner(document, "prove")
    children.preload()
    prepared: Prepared = children.call(prepare, document, folder, full, log=folder / "prepare.log")
    children.preload(*prepared.modules)
    report = Report(models=prepared.models, changes=prepared.changes)
    config = prepared.config

    def add(proofs: Sequence[Proof]) -> None:
        report.proofs += proofs
        show(proofs)

    with children.Group() as group:
        resumed = group.start(_resumed, config, log=folder / "resuming.log")
        gradients = group.start(_gradients, config, compile, log=folder / "gradients.log")
        samples, has_adapter, proofs = gradients.result()
        add(proofs)
        resuming = resumed.result()
        steps = group.start(_steps, config, samples, has_adapter, log=folder / "steps.log")
        exports = group.start(_exports, prepared, log=folder / "exports.log")
        add([*steps.result(), *resuming])
        add(exports.result())
    return report


def prepare(document: ConfigDocument, folder: Path, full: bool) -> Prepared:
    """Write the config that proofs are made of, and the small models.

    Args:
        document: a checked config.
        folder: for what is written.
        full: take the whole model.
    """
    document = document.editable()
    values = raw_dict(document.config)
    models: list[ShrunkModel] = []
    base = next((owner.path for _, owner in reduce.owners(values["model"])), None)
    if not full:
        models = reduce.shrink_models(values, document.file, folder / "models", noise=False)
        base = str(models[0].folder) if models else None
    changes = reduce.use_float32(values)
    changes += reduce.run_alone(values)
    changes += reduce.sample_data(values, LIMITS.rows)
    changes += reduce.shorten(values, LIMITS.tokens)
    changes += reduce.few_steps(values, LIMITS)
    config = folder / "config.py"
    write_config(document, config)
    modules = [model.module for model in models if model.module in sys.modules]
    return Prepared(config, Path(base) if base else None, models, reduce.lines_of(changes), modules)


def _gradients(config: Path, compile: bool) -> tuple[int, bool, list[Proof]]:
    from xtuner.proving.gradient_proofs import GradientProofs
    from xtuner.proving.run_proofs import save_initial
    from xtuner.proving.subject import Subject

    subject = Subject(config)
    samples = len(subject.samples)
    if not samples:
        raise UserError(tr("no row is left to train on."))
    proofs = GradientProofs(subject, compile=compile)
    found = proofs.all()
    save_initial(proofs.model, config.parent)
    return samples, proofs.model.has_adapter, found


def _steps(config: Path, samples: int, has_adapter: bool) -> list[Proof]:
    from xtuner.proving.run_proofs import RunProofs

    return RunProofs(config, samples, has_adapter=has_adapter).one_step()


def _resumed(config: Path) -> list[Proof]:
    from xtuner.proving.run_proofs import RunProofs

    return RunProofs(config, 0, has_adapter=False).resuming()


def _exports(prepared: Prepared) -> list[Proof]:
    from xtuner.proving.export_proofs import ExportProofs
    from xtuner.proving.subject import Subject

    subject = Subject(prepared.config)
    return ExportProofs(subject, prepared.config, prepared.base or prepared.config.parent).all()
