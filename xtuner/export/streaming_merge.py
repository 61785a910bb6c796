"""Merging an adapter layer by layer, without the full base model in memory.

The base is built on torch's meta device and the adapter attached. Each layer that the adapter
changes gets its weight from the base's shard, is merged by peft's own code in fp32, and is written
before the next one is read. So everything that peft merges per layer (LoRA, rsLoRA, DoRA, rank
patterns, PiSSA, LoHa, LoKr, IA3) is merged by peft.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from xtuner.export.adapted_class import auto_class_of
from xtuner.export.model_folder import read_adapter_config, read_json
from xtuner.export.weights import TensorInfo, Weights, shown
from xtuner.model.reward_classes import HEAD, HUB_HEAD, hub_settings
from xtuner.utils.constants import REWARD_FILE
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

STREAMED = ("LORA", "LOHA", "LOKR", "IA3")
ADAPTER = "default"
_REPEATED = ("pissa", "olora")
"""Initializations that change the base's weight, which a merge has to repeat."""
_NOT_REPEATABLE = ("corda", "loftq", "eva")
"""Initializations that need data or the full model."""
HEAD_WEIGHTS = (f"{HEAD}.weight", "classifier.weight")
DEFAULT_LABELS = 2
"""transformers' number of labels where a classifier's config does not say."""


class CannotStream(Exception):
    """The adapter has to be merged with the full model in memory; the message names the reason."""


@dataclass
class StreamingMerge:
    """An adapter on a base on the meta device, ready to be merged layer by layer.

    Attributes:
        base: the base's weights.
        config: of the adapter.
        dtype: of the merged floating-point tensors; the base's own when None.
        device: where layers are merged.
        layers: module name -> peft layer, for the modules that the adapter changes.
        replaced: tensors that the adapter has in full (``modules_to_save``, trained biases).
        tied: name of a tied weight -> name of the weight that it shares.
        untied: those of ``tied`` that the adapter makes different, written as tensors of their own.
        plan: all tensors that ``tensors`` yields, in order.
        config_changes: the keys of the base's ``config.json`` that change.
    """

    base: Weights
    config: PeftConfig
    dtype: torch.dtype | None
    device: str
    layers: dict[str, Any] = field(default_factory=dict)
    replaced: dict[str, torch.Tensor] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    untied: list[str] = field(default_factory=list)
    plan: list[TensorInfo] = field(default_factory=list)
    config_changes: dict[str, Any] = field(default_factory=dict)

    def tensors(self, progress: Callable[[int], None]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the name and value of each tensor of the merged model, in the order of ``plan``.

        Args:
            progress: called with the bytes of each tensor once it was taken.
        """
        for info in self.plan:
            yield info.name, self.compute(info.name).to(info.dtype)
            progress(info.nbytes)

    def compute(self, name: str) -> torch.Tensor:
        """A tensor of the merged model, before it is rounded."""
        module, _, kind = name.rpartition(".")
        if module in self.layers and kind in ("weight", "bias"):
            return self._merged(module, kind)
        own = self.replaced.get(name)
        return self._read_base(name) if own is None else own

    def changes(self, name: str) -> bool:
        """Whether the adapter changes a tensor."""
        return name in self.replaced or name.rpartition(".")[0] in self.layers

    def _read_base(self, name: str) -> torch.Tensor:
        return self.base.read(self.tied.get(name, name))

    def _merged(self, module: str, kind: str) -> torch.Tensor:
        layer = self.layers[module]
        base_layer = layer.get_base_layer()
        kept = dict(base_layer.named_parameters(recurse=False))
        for name in kept:
            source = self.replaced.get(f"{module}.{name}")
            if source is None:
                source = self._read_base(f"{module}.{name}")
            value = source.to(device=self.device, dtype=torch.float32, copy=True)
            setattr(base_layer, name, nn.Parameter(value, requires_grad=False))
        layer.to(device=self.device, dtype=torch.float32)
        _repeat_initialization(layer, self.config)
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:  # peft found NaN
            raise UserError(
                tr("layer {module} cannot be merged: {error}", module=module, error=error),
            ) from error
        merged = getattr(base_layer, kind).detach().cpu()
        layer.merged_adapters.clear()
        for name, parameter in kept.items():
            setattr(base_layer, name, parameter)
        return merged


def prepare_streaming_merge(
    base: Weights,
    adapter: Path,
    dtype: torch.dtype | None,
    device: str,
    *,
    trust_remote_code: bool = False,
) -> StreamingMerge:
    """Attach an adapter to a base model on the meta device.

    Args:
        base: the base's weights, with its ``config.json`` beside them.
        adapter: the adapter's folder.
        dtype: of the merged floating-point tensors; the base's own when None.
        device: where layers are merged: ``cpu`` or ``cuda``.
        trust_remote_code: whether code of the base's folder may run.

    Raises:
        CannotStream: when the full model is needed.
        UserError: when adapter and base do not fit.
    """
    config = read_adapter_config(adapter)
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in STREAMED:
        raise CannotStream(tr("adapters of type {kind}", kind=kind))
    if getattr(config, "target_parameters", None):
        raise CannotStream(tr("adapters with target_parameters"))
    if _initialization_of(config).startswith(_NOT_REPEATABLE):
        raise CannotStream(tr("adapters with a data-driven initialization"))
    model = _build_meta_base(base.path, config.task_type, adapter, trust_remote_code)
    text = model.config.get_text_config()
    vocab_size = text.vocab_size
    rename = _names_in(base, model)
    _check_names(model, base, rename)
    wrapped = attach_adapter(model, config, adapter)
    merge = StreamingMerge(base, config, dtype, device)
    if text.vocab_size != vocab_size:
        if rename is not _same or text is not model.config:
            raise CannotStream(tr("vision-language models with a grown vocabulary"))
        key = model.config.attribute_map.get("vocab_size", "vocab_size")
        merge.config_changes[key] = model.config.vocab_size
    labels = model.config.num_labels or 0
    if labels != DEFAULT_LABELS:
        names = {number: f"LABEL_{number}" for number in range(labels)}
        merge.config_changes["id2label"] = names
        merge.config_changes["label2id"] = {name: number for number, name in names.items()}
    known = model.config.architectures
    if rename is _same and type(model).__name__ not in (known or ()):
        model.config.architectures = [type(model).__name__]
        written = model.config.to_dict()["architectures"]  # ChatGLM writes the name of its body
        if written != known:
            merge.config_changes["architectures"] = written
    _collect(wrapped, merge, rename)
    if is_classifier(config.task_type) and labels == 1:
        settings = hub_reward_settings(adapter, model.config.model_type)
        if settings:
            merge.replaced[f"{HUB_HEAD}.weight"] = merge.replaced.pop(f"{HEAD}.weight")
            merge.config_changes |= settings
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    merge.tied = {rename(name): rename(source) for name, source in tied.items()}
    _untie(merge)
    merge.plan = list(_plan(base, merge))
    return merge


def _build_meta_base(
    base: Path, task_type: str | None, adapter: Path, trusted: bool
) -> PreTrainedModel:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    from xtuner.model.meta_model import keep_on_meta
    from xtuner.model.remote_code import IN_COMMAND, resolve_trust
    from xtuner.model.transformers_models.auto import AutoConfig

    classifier = is_classifier(task_type)
    kind: Any = auto_class_of(base, read_adapter(adapter), classifier=classifier)
    remote = resolve_trust(kind, str(base), trusted=trusted, consent=IN_COMMAND)
    config = AutoConfig.from_pretrained(base, trust_remote_code=remote)
    if getattr(config, "quantization_config", None) is not None:
        raise CannotStream(tr("quantised base models"))
    if classifier:
        config.num_labels = labels_of(adapter)
    with torch.device("meta"):
        model = kind.from_config(config, trust_remote_code=remote)
    keep_on_meta(model)
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    if [entry for entry in conversions if not isinstance(entry, PrefixChange)]:
        raise CannotStream(tr("models whose weights transformers converts on loading"))
    return model


def is_classifier(task_type: object) -> bool:
    """Whether an adapter's task is that of a sequence classifier."""
    return str(getattr(task_type, "value", task_type)) == "SEQ_CLS"


def hub_reward_settings(adapter: Path, model_type: str) -> dict[str, Any]:
    """The settings of the hub's class of a reward model, if there is one and its token is known."""
    file = adapter / REWARD_FILE
    token = read_json(file).get("reward_token_id") if file.is_file() else None
    return hub_settings(model_type, token) if token is not None else {}


def labels_of(adapter: Path) -> int:
    """How many labels the head in an adapter has."""
    heads = [
        tensor for name, tensor in read_adapter(adapter).items() if name.endswith(HEAD_WEIGHTS)
    ]
    return int(heads[0].shape[0]) if heads else DEFAULT_LABELS


def _same(name: str) -> str:
    return name


def _names_in(base: Weights, model: PreTrainedModel) -> Callable[[str], str]:
    """What the base's files call a tensor or module of the model.

    A folder with vision has the tensors of its language model under a longer prefix than the class
    of the language model alone: ``model.language_model.`` for ``model.``.
    """
    prefix = f"{model.base_model_prefix}."
    inside = [name for name, _ in model.named_parameters() if name.startswith(prefix)]
    if not inside or any(name in base.infos for name in inside):
        return _same
    rest = inside[0].removeprefix(prefix)
    longer = [name.removesuffix(rest) for name in base.infos if name.endswith(f".{rest}")]
    found = [
        other
        for other in longer
        if all(other + name.removeprefix(prefix) in base.infos for name in inside)
    ]
    if len(found) != 1:
        return _same

    def rename(name: str) -> str:
        return found[0] + name.removeprefix(prefix) if name.startswith(prefix) else name

    return rename


def _check_names(model: PreTrainedModel, base: Weights, rename: Callable[[str], str]) -> None:
    """Check that the base has all parameters of the model, with their shapes."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    heads = set(HEAD_WEIGHTS)  # new in a classifier made of a language model
    wanted = {
        rename(name): tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if name not in tied and name not in heads
    }
    absent = sorted(set(wanted) - set(base.infos))
    if absent and len(absent) == len(wanted):
        raise CannotStream(tr("models whose weights transformers converts on loading"))
    if absent:
        raise UserError(
            tr("the base model lacks tensors: {absent}", absent=shown(absent)),
            hint=tr("download the base model again."),
            where=Where(str(base.path)),
        )
    wrong = [
        f"{name} {list(base.infos[name].shape)} != {list(shape)}"
        for name, shape in wanted.items()
        if base.infos[name].shape != shape
    ]
    if wrong:
        raise UserError(
            tr(
                "the base's tensors do not have the shapes of its config.json: {wrong}",
                wrong=shown(wrong, 3),
            ),
            where=Where(str(base.path)),
        )


def attach_adapter(model: PreTrainedModel, config: PeftConfig, adapter: Path) -> PeftModel:
    """Wrap the model and load the adapter's tensors; missing and unexpected ones are errors."""
    from peft import PeftModel, set_peft_model_state_dict

    plain = copy.deepcopy(config)
    if hasattr(plain, "init_lora_weights"):
        plain.init_lora_weights = True
    tensors = read_adapter(adapter)
    wrong_base = tr("is this the base that the adapter was trained on?")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            resize_embeddings(model, tensors)
            wrapped = PeftModel(model, plain, low_cpu_mem_usage=True)
            for module in wrapped.modules():
                if hasattr(module, "_move_adapter_to_device_of_base_layer"):
                    # peft would move the adapter to its base layer's device, meta.
                    setattr(module, "_move_adapter_to_device_of_base_layer", _keep_on_device)  # noqa: B010
            result: Any = set_peft_model_state_dict(wrapped, tensors, low_cpu_mem_usage=True)
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise UserError(
            tr("the adapter does not fit the base: {error}", error=error),
            hint=wrong_base,
            where=Where(str(adapter)),
        ) from error
    # With grown embeddings peft saves modules_to_save a second time, under their inner names.
    unexpected = [name for name in result.unexpected_keys if ".modules_to_save." not in name]
    if unexpected:
        raise UserError(
            tr(
                "the base has no modules for these tensors of the adapter: {unexpected}",
                unexpected=shown(unexpected),
            ),
            hint=wrong_base,
            where=Where(str(adapter)),
        )
    missing = sorted(
        name
        for name, parameter in wrapped.named_parameters()
        if parameter.is_meta and f".{ADAPTER}" in name
    )
    if missing:
        raise UserError(
            tr("the adapter lacks tensors: {missing}", missing=shown(missing)),
            hint=tr("convert it again, or check 'target_modules'."),
            where=Where(str(adapter)),
        )
    return wrapped


def _keep_on_device(adapter: str, device: object = None) -> None:
    """Replaces peft's method that moves an adapter to its base layer's device; does nothing."""


def read_adapter(adapter: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter's folder.

    Raises:
        UserError: when it has none.
    """
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (adapter / name).is_file():
            weights = Weights(adapter / name)
            return {key: weights.read(key) for key in weights.infos}
    raise UserError(
        tr("there is no adapter_model.safetensors here."),
        where=Where(str(adapter)),
    )


def resize_embeddings(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
    """Resize a base's embeddings to those of its adapter, which has more if tokens were added."""
    embedding: Any = model.get_input_embeddings()
    name = next((n for n, module in model.named_modules() if module is embedding), None)
    saved = [tensors[key] for key in tensors if key.endswith(f"{name}.weight")]
    if saved and saved[0].shape[0] != embedding.weight.shape[0]:
        model.resize_token_embeddings(saved[0].shape[0], mean_resizing=False)


def _collect(wrapped: PeftModel, merge: StreamingMerge, rename: Callable[[str], str]) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    prefix = "base_model.model."
    for name, module in wrapped.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            for key, value in module.modules_to_save[ADAPTER].state_dict().items():
                merge.replaced[f"{rename(name.removeprefix(prefix))}.{key}"] = value
        elif isinstance(module, AuxiliaryTrainingWrapper):
            raise CannotStream(tr("adapters with trainable_token_indices"))
        elif isinstance(module, BaseTunerLayer) and ADAPTER in (
            getattr(module, "scaling", None) or {ADAPTER: 1}
        ):
            merge.layers[rename(name.removeprefix(prefix))] = module
    for name, parameter in wrapped.named_parameters():
        own = rename(name.removeprefix(prefix).replace(".base_layer.", "."))
        if not parameter.is_meta and f".{ADAPTER}" not in name and own in merge.base.infos:
            merge.replaced[own] = parameter.detach()  # trained biases


def _untie(merge: StreamingMerge) -> None:
    """Untie the weights that an adapter changes on one side alone, such as ``lm_head``.

    peft adds the change to that side's output only, so that base + adapter is an untied model.
    """
    own = merge.replaced
    for name, source in merge.tied.items():
        if not (merge.changes(name) or merge.changes(source)):
            continue
        if name in own and source in own and torch.equal(own[name], own[source]):
            del own[name]
            continue
        if (
            name not in own
            and source in own
            and own[source].shape != merge.base.infos[source].shape
        ):
            continue  # of a grown vocabulary the head is not in the adapter: it stays tied
        merge.untied.append(name)
        merge.config_changes["tie_word_embeddings"] = False


def _plan(base: Weights, merge: StreamingMerge) -> Iterator[TensorInfo]:
    for name, info in base.infos.items():
        shape = tuple(merge.replaced[name].shape) if name in merge.replaced else info.shape
        yield TensorInfo(name, shape, _dtype_of(info.dtype, merge.dtype))
    common = next(iter(base.infos.values())).dtype
    for name, tensor in merge.replaced.items():
        if name not in base.infos:  # a new head
            yield TensorInfo(name, tuple(tensor.shape), _dtype_of(common, merge.dtype))
    for name in merge.untied:
        if name not in base.infos and name not in merge.replaced:
            info = base.infos[merge.tied[name]]
            yield TensorInfo(name, info.shape, _dtype_of(info.dtype, merge.dtype))


def _dtype_of(own: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    return asked if asked is not None and own.is_floating_point else own


def _initialization_of(config: PeftConfig) -> str:
    how = getattr(config, "init_lora_weights", None)
    return how.lower() if isinstance(how, str) else ""


def _repeat_initialization(layer: Any, config: PeftConfig) -> None:
    """Repeat what the adapter's initialization did to the base's weight before training."""
    how = _initialization_of(config)
    if not how.startswith(_REPEATED):
        return
    trained = {name: value.clone() for name, value in layer.state_dict().items() if "lora_" in name}
    if how.startswith("pissa"):
        layer.pissa_init(ADAPTER, how)
    else:
        layer.olora_init(ADAPTER)
    layer.load_state_dict(trained, strict=False)
