"""Code that a folder brings for its model, tokenizer or configuration (``trust_remote_code``).

It runs only where a config or a command says so and neither transformers nor this package has a
class of that name; the files are named on stderr. What transformers 5 does not do for such a model
is done here: buffers that are not saved get their values, which loading leaves as uninitialised
memory.
"""

from __future__ import annotations

import copy
import functools
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xtuner.model.utils import LoadWoInit
from xtuner.registry import LOADER_SETTINGS
from xtuner.utils.errors import UserError, Where
from xtuner.utils.hub import require_available
from xtuner.utils.lang import tr

IN_CONFIG = "trust_remote_code=True"
"""How a config, or a Python call, says that code may run."""
IN_COMMAND = "--trust-remote-code"
"""How a command says it."""

_SETTINGS_FILES = {
    "AutoTokenizer": "tokenizer_config.json",
    "AutoImageProcessor": "preprocessor_config.json",
    "AutoProcessor": "processor_config.json",
}


@dataclass(frozen=True)
class ModelSource:
    """Where the class of a model comes from.

    Args:
        model_class: the class.
        is_remote: whether it is code of the model's folder.
    """

    model_class: Any
    is_remote: bool

    @property
    def takes_our_attention(self) -> bool:
        """Whether it asks transformers' interface for its attention function."""
        return bool(getattr(self.model_class, "_supports_attention_backend", False))


def find_source(loader: Any, name_or_path: str, *, trusted: bool) -> ModelSource | None:
    """Find the class that a model is to be loaded with.

    A class that is known here is preferred to code of the folder that defines one of the same name.

    Args:
        loader: an Auto class, or a model's class.
        name_or_path: folder or hub name.
        trusted: whether code of the folder may run.

    Returns:
        None where there is no such model, or nothing says what its class is.

    Raises:
        UserError: when only the folder's code knows the model, and it may not run.
    """
    if not hasattr(loader, "_model_mapping"):
        return ModelSource(loader, is_remote=False)
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    from xtuner.model.transformers_models.auto import model_classes

    place = _base_of(name_or_path)
    config = _read_settings(loader, place)
    if resolve_trust(loader, place, trusted=trusted):
        reference = (config.get("auto_map") or {}).get(loader.__name__)
        if reference is None:
            return None
        return ModelSource(get_class_from_dynamic_module(reference, place), is_remote=True)
    known = model_classes(loader, str(config.get("model_type")))
    wanted = (config.get("architectures") or [None])[0]
    local = known.get(str(wanted)) or next(iter(known.values()), None)
    return None if local is None else ModelSource(local, is_remote=False)


def resolve_trust(
    loader: type, name_or_path: str, *, trusted: bool, consent: str = IN_CONFIG
) -> bool:
    """The ``trust_remote_code`` to call ``loader.from_pretrained`` with.

    Args:
        loader: an Auto class of transformers, for models, tokenizers, configurations or processors;
            or a class, which runs no code of a folder.
        name_or_path: folder or hub name.
        trusted: whether code of the folder may run.
        consent: how the user says so, for the error.

    Returns:
        True where the folder's code is needed and may run; its files are then named on stderr.

    Raises:
        UserError: when it is needed and may not run.
    """
    place = _base_of(name_or_path)
    needed = _needed_code(loader, _read_settings(loader, place), trusted)
    if needed and loader.__name__ == "AutoTokenizer":  # which loads the configuration, too
        needed = [*_configuration_code(place), *needed]
    if needed and not trusted:
        raise UserError(
            tr("only code that comes with the model knows its class: {code}", code=needed[-1]),
            hint=tr(
                "if you trust {file}, add {consent}", file=_file(needed[-1], place), consent=consent
            ),
            where=Where(name_or_path),
        )
    for reference in needed:
        _announce(_file(reference, place), reference)
    return bool(needed)


def load_pretrained(
    loader: type,
    name_or_path: str | Path,
    *,
    trusted: bool,
    consent: str = IN_COMMAND,
    **settings: object,
) -> Any:
    """Call ``loader.from_pretrained``, where code of the folder runs only if it is trusted.

    Args:
        loader, name_or_path, trusted, consent: as ``resolve_trust``.
        settings: further arguments of ``from_pretrained``.

    Raises:
        UserError: as ``resolve_trust``.
    """
    remote = resolve_trust(loader, str(name_or_path), trusted=trusted, consent=consent)
    from_pretrained: Any = getattr(loader, "from_pretrained")  # noqa: B009
    try:
        loaded = from_pretrained(name_or_path, trust_remote_code=remote, **settings)
    except (TypeError, KeyError, AttributeError, IndexError, ZeroDivisionError) as error:
        if remote:
            raise  # an error of the folder's code
        raise UserError(
            tr("the files of this model cannot be used: {why}", why=repr(error)),
            hint=tr("config.json or the tokenizer's files are damaged, or of another version."),
            where=Where(str(name_or_path)),
        ) from error
    model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
    if remote and isinstance(model, nn.Module):
        restore_buffers(model)
    return loaded


def has_code(name_or_path: str) -> bool:
    """Whether a folder brings code of its own for the model, its configuration or tokenizer."""
    from xtuner.model.transformers_models.auto import AutoConfig, AutoTokenizer

    place = _base_of(name_or_path)
    return any(_read_settings(kind, place).get("auto_map") for kind in (AutoConfig, AutoTokenizer))


@LOADER_SETTINGS.register_module(name="trust_remote_code")
def with_resolved_trust(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a ``from_pretrained`` in a config with ``trust_remote_code`` resolved.

    Args:
        settings: with ``type``; changed only where that is an Auto class of transformers.
    """
    resolved: Any = copy.copy(settings)
    loader = getattr(settings["type"], "__self__", None)
    name_or_path = settings.get("pretrained_model_name_or_path")
    if getattr(settings["type"], "__name__", "") != "from_pretrained" or name_or_path is None:
        return resolved
    if isinstance(loader, type) and _is_auto_class(loader):
        trusted = bool(settings.get("trust_remote_code"))
        trust = resolve_trust(loader, str(name_or_path), trusted=trusted)
        resolved["trust_remote_code"] = trust
    return resolved


def _is_auto_class(loader: object) -> bool:
    name = getattr(loader, "__name__", "")
    return hasattr(loader, "_model_mapping") or name in {"AutoConfig", *_SETTINGS_FILES}


def _base_of(name_or_path: str) -> str:
    """The folder itself; of an adapter's folder its base, which transformers loads in its place."""
    folder = Path(name_or_path).expanduser()
    file = folder / "adapter_config.json"
    if not file.is_file() or (folder / "config.json").is_file():
        return name_or_path
    return str(_read_json(file).get("base_model_name_or_path") or name_or_path)


def _read_settings(loader: type, name_or_path: str) -> dict[str, Any]:
    """The JSON file that names the class for an Auto class; ``{}`` where there is none.

    Raises:
        UserError: when there is no such folder, cached model or model on the hub.
    """
    require_available(name_or_path)
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.utils import cached_file

    name = _SETTINGS_FILES.get(getattr(loader, "__name__", ""))
    try:
        if name is None:
            return dict(PreTrainedConfig.get_config_dict(name_or_path)[0])
        return _read_json(Path(str(cached_file(name_or_path, name))))
    except (OSError, ValueError):
        return {}


def _read_json(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text("utf-8"))
    return content if isinstance(content, dict) else {}


def _needed_code(loader: type, settings: Mapping[str, Any], trusted: bool) -> list[str]:
    """References (``file.Class``) to code of the folder that no class known here replaces."""
    if not _is_auto_class(loader):
        return []
    references = settings.get("auto_map") or {}
    if not isinstance(references, Mapping):  # tokenizers of early versions: [slow, fast]
        references = {"AutoTokenizer": references}
    own = references.get(loader.__name__)
    wanted = [own] if isinstance(own, str) else [entry for entry in own or () if entry]
    if loader.__name__ == "AutoTokenizer":
        names = {_class_of(reference) for reference in wanted}
        if not trusted:  # the class that the folder declares, where it may not define another
            names.add(str(settings.get("tokenizer_class")))
        return [] if any(map(_is_known_tokenizer, names)) else wanted[-1:]
    if loader.__name__ in _SETTINGS_FILES:
        return wanted
    return _needed_by_model(loader, settings, references, wanted)


def _configuration_code(name_or_path: str) -> list[str]:
    """References to the folder's code that ``AutoConfig`` runs once code may run."""
    from xtuner.model.transformers_models.auto import AutoConfig

    references = _read_settings(AutoConfig, name_or_path).get("auto_map")
    own = references.get("AutoConfig") if isinstance(references, Mapping) else None
    return [own] if isinstance(own, str) else []


def _needed_by_model(
    loader: type, settings: Mapping[str, Any], references: Mapping[str, Any], wanted: list[str]
) -> list[str]:
    from transformers import CONFIG_MAPPING

    from xtuner.model.transformers_models.auto import model_classes

    configuration = [references[name] for name in ("AutoConfig",) if references.get(name)]
    model_type = str(settings.get("model_type"))
    if loader.__name__ == "AutoConfig" or not wanted:
        return [] if model_type in CONFIG_MAPPING else configuration
    known = model_classes(loader, model_type)
    return [] if _class_of(wanted[0]) in known else [*configuration, *wanted]


def _is_known_tokenizer(name: str) -> bool:
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    from xtuner.model.transformers_models import auto

    stem = name.removesuffix("Fast")
    if stem in auto.TOKENIZERS:
        return True
    return any(tokenizer_class_from_name(one) is not None for one in (stem, f"{stem}Fast"))


def _class_of(reference: str) -> str:
    return reference.rpartition(".")[2]


def _file(reference: str, name_or_path: str) -> str:
    """Where code lies: ``folder/file.py``, or in another repository of the hub."""
    repository, _, place = reference.rpartition("--")
    module = place.rpartition(".")[0].replace(".", "/")
    return f"{repository or name_or_path}/{module}.py"


@functools.cache
def _announce(file: str, reference: str) -> None:
    print(
        tr("code of the model folder is run: {file} ({code})", file=file, code=reference),
        file=sys.stderr,
    )


def restore_buffers(model: nn.Module) -> list[str]:
    """Give a loaded model the buffers that are not saved, as its own code computes them.

    They are computed once more by a model of the same class without weights.

    Args:
        model: changed in place.

    Returns:
        The names of the buffers that were wrong.

    Raises:
        UserError: when the class cannot be built so and a buffer is not finite.
    """
    saved = set(model.state_dict())
    computed = {name: value for name, value in model.named_buffers() if name not in saved}
    if not computed:
        return []
    try:
        reference = dict(_without_weights(model).named_buffers())
    except Exception as error:  # whatever the folder's code fails with
        wrong = [name for name, value in computed.items() if not _is_finite(value)]
        if not wrong:
            return []
        raise UserError(
            tr(
                "{count} buffers of {model} are not numbers after loading: {names}",
                count=len(wrong),
                model=type(model).__name__,
                names=", ".join(wrong[:3]),
            ),
            hint=tr(
                "its code does not work with this version of transformers: {error}", error=error
            ),
        ) from error
    restored = []
    for name, value in computed.items():
        right = reference[name].to(device=value.device, dtype=value.dtype)
        if right.shape != value.shape or not torch.equal(right, value):
            restored.append(name)
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent)._buffers[leaf] = right
    return restored


def _without_weights(model: nn.Module) -> nn.Module:
    """A model of the same class and configuration: buffers on the CPU, weights nowhere."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False), LoadWoInit(), torch.device("cpu"):
        built: nn.Module = type(model)(model.config)
    return built


def _is_finite(value: torch.Tensor) -> bool:
    return not value.is_floating_point() or bool(value.isfinite().all())
