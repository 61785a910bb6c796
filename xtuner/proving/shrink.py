"""A small model of a user's class: his ``config.json`` with small sizes and random weights.

What decides how a model computes stays: the class, the vocabulary, the rotary embedding, grouped
heads, shared experts, tied embeddings, and at least one layer of every kind. Width, the number of
layers of a kind and the number of experts are small.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from xtuner.model.meta_model import make_model
from xtuner.proving.tiny_settings import SIZES, cut_to_layers, tiny_sizes
from xtuner.utils.errors import UserError, Where
from xtuner.utils.hub import model_file
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

SEED = 0
SMALL = 4_000_000
"""A model with at most so many parameters beside its embeddings is kept as it is."""
ROTARY_SIZE = 16
"""``head_dim`` of a small model."""
_KEPT = {name for name, size in SIZES.items() if size >= 512}
_KEPT |= {"attention_chunk_size", "attn_layer_period"}
"""The vocabulary and the positions, which depend on the data; which layer is of which kind."""
_LAYER_COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers",
    "num_decoder_layers",
)  # fmt: skip
_DENSE_LAYERS = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
"""How many layers come before the first one with experts."""
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "n_head_kv")
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack", ".onnx")
_INDEX = ".index.json"
_OF_NO_KIND = ("layer_idx", "layer_id", "layer_index", "layer_number", "training", "layer_num")


class Owner(NamedTuple):
    """What a config loads a model with.

    Attributes:
        loader: the class, or Auto class, whose ``from_pretrained`` is called.
        path: ``pretrained_model_name_or_path``.
        trusted: whether code of the folder may run.
    """

    loader: Any
    path: str
    trusted: bool


@dataclass(frozen=True)
class ShrunkModel:
    """A small model in a folder.

    Attributes:
        folder: with ``config.json``, weights, and the other files of the original.
        model_class: the name of its class.
        layers: how many of the original's layers it has.
        of_layers: how many the original has.
        kinds: how many kinds of layers there are.
        width: its ``hidden_size``.
        of_width: that of the original.
        module: of its class.
    """

    folder: Path
    model_class: str
    layers: int
    of_layers: int
    kinds: int
    width: int
    of_width: int
    module: str = ""

    def __str__(self) -> str:
        return tr(
            "{model_class}: {layers} of {of_layers} layers ({kinds} kinds), width {width} of "
            "{of_width}",
            model_class=self.model_class,
            layers=self.layers,
            of_layers=self.of_layers,
            kinds=self.kinds,
            width=self.width,
            of_width=self.of_width,
        )


def write_shrunk(owner: Owner, folder: Path, *, noise: bool = True) -> ShrunkModel:
    """Write a small model of a config's class, with random weights in float32.

    Args:
        owner: what the config loads.
        folder: to be written.
        noise: keep the model's own dropout; without it two calls agree.

    Raises:
        UserError: when ``config.json`` is not here, or the class cannot be made.
    """
    source = model_file(owner.path, "config.json")
    if source is None:
        raise UserError(
            tr("there is no config.json of {path} on this machine.", path=owner.path),
            hint=tr("its config.json and tokenizer files are enough; weights are not needed."),
            where=Where(owner.path),
        )
    config = _read_config(owner)
    shrunk, kinds = shrink_config(owner, config)
    if not noise:
        without_noise(shrunk)
    model = _random_model(owner, shrunk)
    _copy_side_files(source.parent, folder)
    model.save_pretrained(folder)
    text, original = shrunk.get_text_config(), config.get_text_config()
    return ShrunkModel(
        folder,
        type(model).__name__,
        layers=_depth(text),
        of_layers=_depth(original),
        kinds=kinds,
        width=text.hidden_size,
        of_width=original.hidden_size,
        module=type(model).__module__,
    )


def _read_config(owner: Owner) -> Any:
    from xtuner.model.transformers_models.auto import AutoConfig

    return AutoConfig.from_pretrained(owner.path, trust_remote_code=owner.trusted)


def shrink_config(owner: Owner, config: PreTrainedConfig) -> tuple[Any, int]:
    """Make the configuration of a small model.

    Args:
        owner: what the config loads.
        config: the original's.

    Returns:
        The configuration, and how many kinds of layers the model has.

    Raises:
        UserError: when the class cannot be made.
    """
    if _parameters(_meta_model(owner, config)) <= SMALL:
        kinds = layer_kinds(_meta_model(owner, config), _depth(config.get_text_config()))
        return config, len(set(kinds))
    deep = _with_sizes(config, None)
    kinds = layer_kinds(_meta_model(owner, deep), _depth(deep.get_text_config()))
    if not kinds:
        return _with_sizes(config, (0, 1)), 1
    first = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    chosen = first if len(first) > 1 else [0, 1]
    small = _with_sizes(config, chosen)
    found = layer_kinds(_meta_model(owner, small), len(chosen))
    if set(found) != set(kinds):  # the class decides by the number of a layer, not by a list
        small = _with_sizes(config, range(max(first) + 1), dense_layers=None)
    return small, len(first)


def layer_kinds(model: nn.Module, depth: int) -> list[tuple[object, ...]]:
    """What tells the layers of a model apart: classes, shapes and plain settings of their parts.

    Args:
        model: on any device.
        depth: how many layers it has.

    Returns:
        A key of each layer; empty where the model has no list of so many layers.
    """
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    return [tuple(_kind(each[number]) for each in lists) for number in range(depth if lists else 0)]


def _kind(layer: nn.Module) -> tuple[object, ...]:
    parts = []
    for name, module in layer.named_modules():
        plain = tuple(
            (key, value)
            for key, value in sorted(vars(module).items())
            if isinstance(value, bool | int | str | None)
            and key not in _OF_NO_KIND
            and not key.startswith("_")
        )
        shapes = tuple((key, tuple(p.shape)) for key, p in module.named_parameters(recurse=False))
        parts.append((name, type(module).__qualname__, plain, shapes))
    return tuple(parts)


def _with_sizes(
    config: PreTrainedConfig, layers: Sequence[int] | None, dense_layers: int | None = 1
) -> Any:
    """A configuration with small sizes.

    Args:
        config: the original.
        layers: those of the language model to keep; None for all.
        dense_layers: how many come before the first one with experts; None as in the original.
    """
    values = config.to_dict()
    values.pop("quantization_config", None)
    values.pop("dtype", None)
    values.pop("torch_dtype", None)
    _put(values, _settings(config, layers, dense_layers))
    return type(config).from_dict(values)


def _put(values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(values.get(name), dict):
            _put(values[name], value)
        else:
            values[name] = value


def _settings(
    config: PreTrainedConfig, layers: Sequence[int] | None, dense_layers: int | None
) -> dict[str, Any]:
    """The changed settings of a configuration and, by name, of those inside it."""
    from transformers import PreTrainedConfig

    own = vars(config)
    inner = {name: part for name, part in own.items() if isinstance(part, PreTrainedConfig)}
    text = config.get_text_config()
    nested = {
        name: _settings(part, layers if part is text else None, dense_layers)
        for name, part in inner.items()
    }
    depth = _depth(config)
    is_tower = text is config and layers is None and "vocab_size" not in own
    if is_tower and depth:  # of images or sounds: two of its layers, which are alike
        layers = range(min(2, depth))
    return {**_small_sizes(own, layers, dense_layers), **nested}


def _small_sizes(
    own: Mapping[str, Any], layers: Sequence[int] | None, dense_layers: int | None
) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        name: min(size, own[name])
        for name, size in tiny_sizes(own).items()
        if name not in _KEPT and name not in _LAYER_COUNTS and name not in _DENSE_LAYERS
        if isinstance(own.get(name), int)
    }
    heads, small_heads = own.get("num_attention_heads"), sizes.get("num_attention_heads")
    for name in _KV_HEADS:  # grouped heads stay grouped, and one for all stays one
        if name in sizes and heads and small_heads and "qk_rope_head_dim" not in sizes:
            sizes[name] = small_heads if own[name] == heads else min(2, own[name])
    if "expand" in own and {"num_heads", "head_dim"} <= sizes.keys():  # Mamba-2
        sizes["num_heads"] = int(own["expand"] * sizes["hidden_size"]) // sizes["head_dim"]
    if layers is not None:
        sizes |= {name: len(layers) for name in _LAYER_COUNTS if own.get(name)}
        sizes |= cut_to_layers(own, layers)
        if dense_layers is not None:
            sizes |= {name: dense_layers for name in _DENSE_LAYERS if own.get(name)}
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(own.get(name), dict):
            sizes[name] = _small_rotary(own[name], own, sizes)
    return sizes


def _small_rotary(
    settings: Mapping[str, Any], own: Mapping[str, Any], sizes: Mapping[str, Any]
) -> dict[str, Any]:
    """Rotary settings whose lists have an item for each pair of rotated numbers, cut to fewer."""
    share = settings.get("partial_rotary_factor") or own.get("partial_rotary_factor") or 1.0
    pairs = int(sizes.get("qk_rope_head_dim") or sizes.get("head_dim") or ROTARY_SIZE)
    pairs = int(pairs * share) // 2
    small: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            small[name] = _small_rotary(value, own, sizes)
        elif name in ("long_factor", "short_factor"):
            small[name] = list(value)[:pairs]
        elif name == "mrope_section":
            small[name] = _split(pairs, len(value))
        else:
            small[name] = value
    return small


def _split(total: int, parts: int) -> list[int]:
    """``total`` as a sum of ``parts`` numbers that are about equal."""
    return [total * (n + 1) // parts - total * n // parts for n in range(parts)]


def _depth(config: PreTrainedConfig) -> int:
    for name in _LAYER_COUNTS:
        depth = getattr(config, name, None)
        if isinstance(depth, int):
            return depth
    return 0


def _meta_model(owner: Owner, config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return make_model(owner.loader, config, owner.trusted, {"dtype": torch.float32})


def _parameters(model: PreTrainedModel) -> int:
    """Parameters beside the embeddings."""
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    tables |= {id(p) for p in head.parameters()} if head is not None else set()
    return sum(p.numel() for p in model.parameters() if id(p) not in tables)


def _random_model(owner: Owner, config: PreTrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = make_model(owner.loader, config, owner.trusted, {"dtype": torch.float32})
        for weight in model.parameters():  # zeros would hide what depends on them
            if not weight.any():
                nn.init.normal_(weight, std=0.02)
    return model


def without_noise(config: PreTrainedConfig) -> PreTrainedConfig:
    """Set each dropout and jitter of a configuration to 0, so that two calls agree."""
    from transformers import PreTrainedConfig

    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            without_noise(value)
        elif isinstance(value, float) and ("drop" in name or "jitter" in name):
            setattr(config, name, 0.0)
    return config


def _copy_side_files(source: Path, folder: Path) -> None:
    """Copy what is beside the weights: the tokenizer, templates, code."""
    folder.mkdir(parents=True)
    for file in _side_files(source.iterdir()):
        shutil.copy(file, folder / file.name)
    folder.joinpath("config.json").unlink(missing_ok=True)


def _side_files(files: Iterable[Path]) -> list[Path]:
    """The files that hold no weights, and name none."""
    return [
        file
        for file in files
        if file.is_file() and file.suffix not in _WEIGHTS and not file.name.endswith(_INDEX)
    ]


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of a file; empty where there is none."""
    found = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return found if isinstance(found, dict) else {}
