"""A plan of a run: its memory on each GPU, its length, and whether it fits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from mmengine.config import Config
from torch import nn

from xtuner.config.adapt.strategy import adapt_strategy
from xtuner.config.compat import adapt_published
from xtuner.config.document import ConfigDocument
from xtuner.config.values import name_of, own_values
from xtuner.planning.activations import Activations, trace_activations, trace_image
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

    from xtuner.model.image_text import VisionLanguageModel
    from xtuner.model.vision_language import VisionLanguageModel as EncoderBeforeModel

SIDE = 448
"""Pixels of a side of the image that is counted; large ones keep as much for each token."""


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
class Measured:
    """What a few real steps needed in one process.

    Attributes:
        device: ``cpu``, or the GPU's name.
        memory: the most bytes that tensors took on the GPU; None on a CPU.
        batch_seconds: of a micro-batch, its share of the optimizer's step included.
        tokens_per_second: padding left out.
    """

    device: str
    memory: int | None
    batch_seconds: float
    tokens_per_second: float


@dataclass(frozen=True)
class Plan:
    """What a run needs on a machine.

    Attributes:
        settings: of the run.
        machine: what it gets.
        sizes: of its weights.
        memory: of one GPU.
        schedule: how long it is.
        images: whether weights are trained through which only images go: ``counted``, where the
            activations that these keep of a row full of images are counted, ``unknown``, where a
            class does not let them be counted; empty where none is trained.
        measured: real steps, by which activations and time are corrected.
    """

    settings: RunSettings
    machine: Machine
    sizes: StateSizes
    memory: Memory
    schedule: Schedule
    images: str = ""
    measured: Measured | None = None

    @property
    def fits(self) -> bool | None:
        """Whether one GPU has room for it; None where its memory is not known."""
        card = self.machine.card
        return None if card is None else self.memory.total <= card.usable

    def to_dict(self) -> dict[str, object]:
        """As plain data, for ``--json``."""
        return {**asdict(self), "total": self.memory.total, "fits": self.fits}


class _Sized(NamedTuple):
    """What is known of a model from its weights: see ``memory_of``.

    Attributes:
        more_tokens: that rows have in the model, beside those of the dataset: of an image.
    """

    sizes: StateSizes
    head: Head
    more_tokens: int


class _Traced(NamedTuple):
    """What a forward pass of one row keeps; ``images`` as in ``Plan``."""

    activations: Activations
    images: str


@dataclass
class Planner:
    """Makes plans of one config and changes of it; what they have in common is computed once.

    Args:
        rows: of the config's dataset; None: not known.
        measured: see ``calibrate``.
    """

    rows: int | None = None
    measured: Measured | None = None
    _scale: float = 1.0
    _seconds_per_token: float = 0.0
    _traced: dict[tuple[str, int, str], _Traced] = field(default_factory=dict)
    _sized: dict[tuple[str, str], _Sized] = field(default_factory=dict)

    def calibrate(self, measured: Measured, alone: Plan) -> None:
        """Correct the activations and the time of all plans by what real steps needed.

        Args:
            measured: the steps, in one process.
            alone: the plan of one process.
        """
        self.measured = measured
        # of full rows, which plans count: a change of the micro-batch changes the time with it
        self._seconds_per_token = measured.batch_seconds / alone.settings.tokens
        memory = alone.memory
        if measured.memory is not None and memory.activations:
            others = memory.total - memory.activations - memory.libraries - memory.margin
            self._scale = max(0, measured.memory - others) / memory.activations

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
        return self.plan_adapted(config, machine)

    def plan_adapted(self, config: Config, machine: Machine) -> Plan:
        """Plan a run whose config has been adapted, its strategy included.

        Args:
            config: as the run uses it.
            machine: what it gets; how it shards the model is in the config.

        Raises:
            UserError: when the model cannot be built from its ``config.json``.
        """
        settings = read_settings(config, machine.ranks)
        model = dict.get(own_values(config), "model")
        if not isinstance(model, dict):
            where = Where(config.filename, key="model")
            raise UserError(tr("the config has no model."), where=where)
        (sizes, head, more_tokens), (activations, images) = self._model(model, settings)
        settings = replace(settings, length=settings.length + more_tokens)
        share = settings.batch_size * settings.sequences / settings.sequence_parallel
        memory = memory_of(sizes, activations.of_batches(share), settings, head=head)
        memory = replace(memory, activations=int(memory.activations * self._scale))
        recomputed = settings.checkpointing.share if settings.checkpointing else 0.0
        operations = operations_per_token(
            sizes.computed, sizes.trained_count, recomputed=recomputed
        )
        schedule = schedule_of(
            settings,
            rows=self.rows,
            operations=operations,
            tflops=machine.card.tflops if machine.card else None,
            checkpoint=sizes.trained + sizes.optimizer,
        )
        if self.measured is not None and schedule.tokens is not None:
            seconds = schedule.tokens * self._seconds_per_token / settings.sharding.ranks
            schedule = replace(schedule, seconds=seconds)
        return Plan(settings, machine, sizes, memory, schedule, images, self.measured)

    def _model(self, model: Mapping[str, Any], settings: RunSettings) -> tuple[_Sized, _Traced]:
        """The model's sizes and activations, measured together where neither is known."""
        name = _key(model)
        sized, traced = (name, settings.optimizer), (name, settings.length, settings.dtype)
        if sized not in self._sized or traced not in self._traced:
            built = build_planned_model(model)
            language_model = language_model_of(built)
            self._sized[sized] = _sizes(built, language_model, settings.optimizer)
            self._traced[traced] = _trace(built.model, language_model, settings)
        return self._sized[sized], self._traced[traced]


def _trace(model: nn.Module, language_model: Any, settings: RunSettings) -> _Traced:
    """Count what one row keeps, full of text or, where weights for images are trained, of images.

    The model is of no other use afterwards.
    """
    trains_images = _trains_vision(model, language_model)
    dtype = torch_dtype(settings.dtype)
    of_images, length = None, settings.length
    if trains_images and (encoder := _encoder_of(model)) is not None:
        encode, tokens = encoder.encode_blank(SIDE)
        length += _more_tokens(model)
        of_image = trace_image(model, encode, autocast=dtype)
        count = 1.0 if encoder.lengthens_rows else length / tokens
        of_images = of_image.of_batches(count) if of_image else None
    found = trace_activations(
        model,
        language_model,
        batch_size=1,
        length=length,
        autocast=dtype,
        after_trained=trains_images,
    )
    if of_images is not None:
        return _Traced(found.with_images(of_images), "counted")
    return _Traced(found, "unknown" if trains_images else "")


def _encoder_of(model: nn.Module) -> VisionLanguageModel | EncoderBeforeModel | None:
    """The model itself, where it computes features of images."""
    from xtuner.model import image_text, vision_language

    known = (image_text.VisionLanguageModel, vision_language.VisionLanguageModel)
    return model if isinstance(model, known) else None


def _more_tokens(model: nn.Module) -> int:
    """How many tokens an image adds to a row; a row of LLaVA's has one image."""
    encoder = _encoder_of(model)
    if encoder is None or not encoder.lengthens_rows:
        return 0
    _, tokens = encoder.encode_blank(SIDE)
    return tokens - 1


def _sizes(built: PlannedModel, language_model: Any, optimizer: str) -> _Sized:
    config = language_model.config.get_text_config()
    head = language_model.get_output_embeddings()
    trained = [w.numel() for w in head.parameters() if w.requires_grad] if head else []
    sizes = state_sizes(built, optimizer, _chosen_experts(config))
    head_sizes = Head(config.hidden_size, config.vocab_size, sum(trained))
    return _Sized(sizes, head_sizes, _more_tokens(built.model))


def _trains_vision(model: nn.Module, language_model: Any) -> bool:
    """Whether trained weights are outside of the layers and embeddings that compute text."""
    decoder = language_model.get_decoder()
    inner = getattr(decoder, "language_model", decoder)  # a model of images and text has it inside
    of_text = (inner, language_model.get_input_embeddings(), language_model.get_output_embeddings())
    known = {id(weight) for part in of_text if part is not None for weight in part.parameters()}
    return any(weight.requires_grad and id(weight) not in known for weight in model.parameters())


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
