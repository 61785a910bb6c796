"""A plan of a run: its memory on each GPU, its length, and whether it fits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from xtuner.config.adapt.strategy import adapt_strategy
from xtuner.config.compat import adapt_published
from xtuner.config.document import ConfigDocument
from xtuner.config.values import name_of, own_values
from xtuner.planning.activations import Activations, trace_activations
from xtuner.planning.cards import Card
from xtuner.planning.memory import Head, Memory, StateSizes, memory_of, state_sizes
from xtuner.planning.planned_model import PlannedModel, build_planned_model
from xtuner.planning.schedule import Schedule, operations_per_token, schedule_of
from xtuner.planning.settings import RunSettings, read_settings
from xtuner.utils.dtypes import torch_dtype
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Machine:
    """What a run gets.

    Attributes:
        card: the kind of GPU; None: no limit is known.
        gpus: how many on each machine.
        nodes: how many machines.
        deepspeed: a DeepSpeed config, by path or name.
        fsdp: shard the model with FSDP.
        offload: keep the shards of FSDP in main memory.
    """

    card: Card | None = None
    gpus: int = 1
    nodes: int = 1
    deepspeed: str | None = None
    fsdp: bool = False
    offload: bool = False

    @property
    def ranks(self) -> int:
        return self.gpus * self.nodes


@dataclass(frozen=True)
class Plan:
    """What a run needs on a machine.

    Attributes:
        settings: of the run.
        machine: what it gets.
        sizes: of its weights.
        memory: of one GPU.
        schedule: how long it is.
        has_images: whether rows may have images, whose part of the activations is not known.
    """

    settings: RunSettings
    machine: Machine
    sizes: StateSizes
    memory: Memory
    schedule: Schedule
    has_images: bool = False

    @property
    def fits(self) -> bool | None:
        """Whether one GPU has room for it; None where its memory is not known."""
        card = self.machine.card
        return None if card is None else self.memory.total <= card.usable

    def to_dict(self) -> dict[str, object]:
        """As plain data, for ``--json``."""
        return {**asdict(self), "total": self.memory.total, "fits": self.fits}


class _Model(NamedTuple):
    """A model, measured: see ``memory_of``."""

    sizes: StateSizes
    head: Head
    activations: Activations


@dataclass
class Planner:
    """Makes plans of one config and changes of it; what they have in common is computed once.

    Args:
        rows: of the config's dataset; None: not known.
    """

    rows: int | None = None
    _traced: dict[tuple[str, int, str], Activations] = field(default_factory=dict)
    _sized: dict[tuple[str, str], tuple[StateSizes, Head]] = field(default_factory=dict)

    def plan(self, document: ConfigDocument, machine: Machine) -> Plan:
        """Plan a run.

        Args:
            document: a loaded config, overrides applied.
            machine: what it gets.

        Raises:
            UserError: when the model cannot be built from its ``config.json``, or settings
                contradict each other.
        """
        document = document.editable()
        config = document.config
        adapt_published(config)
        adapt_strategy(
            config, deepspeed=machine.deepspeed, fsdp=machine.fsdp, offload=machine.offload
        )
        settings = read_settings(config, machine.ranks)
        model = dict.get(own_values(config), "model")
        if not isinstance(model, dict):
            raise UserError(tr("the config has no model."), where=Where(document.file, key="model"))
        measured = self._model(model, settings)
        sizes = measured.sizes
        memory = memory_of(
            sizes,
            measured.activations,
            settings,
            head=measured.head,
        )
        operations = operations_per_token(
            sizes.computed, sizes.trained_count, checkpointing=settings.checkpointing
        )
        schedule = schedule_of(
            settings,
            rows=self.rows,
            operations=operations,
            tflops=machine.card.tflops if machine.card else None,
            checkpoint=sizes.trained + sizes.optimizer,
        )
        has_images = model.get("processor") is not None
        return Plan(settings, machine, sizes, memory, schedule, has_images)

    def _model(self, model: Mapping[str, Any], settings: RunSettings) -> _Model:
        """The model's sizes and activations, measured together where neither is known."""
        name = _key(model)
        sized, traced = (name, settings.optimizer), (name, settings.length, settings.dtype)
        if sized not in self._sized or traced not in self._traced:
            built = build_planned_model(model)
            language_model = language_model_of(built)
            self._sized[sized] = _sizes(built, language_model, settings.optimizer)
            self._traced[traced] = trace_activations(
                built.model,
                language_model,
                batch_size=1,
                length=settings.length,
                autocast=torch_dtype(settings.dtype),
            )
        activations = self._traced[traced].of_batches(settings.batch_size * settings.sequences)
        return _Model(*self._sized[sized], activations)


def _sizes(built: PlannedModel, language_model: Any, optimizer: str) -> tuple[StateSizes, Head]:
    config = language_model.config.get_text_config()
    head = language_model.get_output_embeddings()
    trained = [w.numel() for w in head.parameters() if w.requires_grad] if head else []
    sizes = state_sizes(built, optimizer, _chosen_experts(config))
    return sizes, Head(config.hidden_size, config.vocab_size, sum(trained))


def language_model_of(built: PlannedModel) -> Any:
    """The transformers model in a config's model, its layers wrapped where it has an adapter."""
    model: Any = built.model
    causal_lm: nn.Module | None = getattr(model, "causal_lm", None)
    return causal_lm if causal_lm is not None else model


def _chosen_experts(config: PreTrainedConfig) -> float:
    """The share of a mixture's experts that computes a token; 1 for a dense model."""
    chosen = getattr(config, "num_experts_per_tok", None)
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        count = getattr(config, name, None)
        if chosen and count:
            return float(chosen / count)
    return 1.0


def _key(model: Mapping[str, Any]) -> str:
    """A text that is the same for settings that build the same model."""
    return json.dumps(_plain(model), sort_keys=True)


def _plain(value: object) -> Any:
    if isinstance(value, dict):
        skipped = "use_activation_checkpointing"
        return {str(k): _plain(v) for k, v in dict.items(value) if k != skipped}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, torch.dtype | str | int | float | bool) or value is None:
        return str(value)
    return name_of(value)
