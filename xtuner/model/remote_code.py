"""Models whose folder brings the code of their class (``trust_remote_code``).

That code runs only where the config says so and no class is known here. What transformers 5 does
not do for such a class is done here: buffers that are not saved get their values, which loading
leaves as uninitialised memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from xtuner.model.utils import LoadWoInit
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr


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
    mapping = getattr(loader, "_model_mapping", None)
    if mapping is None:
        return ModelSource(loader, is_remote=False)
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    from xtuner.model.transformers_models.auto import model_classes

    try:
        config, _ = PreTrainedConfig.get_config_dict(name_or_path)
    except (OSError, ValueError):
        return None
    known = model_classes(loader, str(config.get("model_type")))
    reference = (config.get("auto_map") or {}).get(loader.__name__)
    wanted = (config.get("architectures") or [None])[0]
    if reference is None or reference.rpartition(".")[2] in known:
        local = known.get(str(wanted)) or next(iter(known.values()), None)
        return None if local is None else ModelSource(local, is_remote=False)
    if not trusted:
        raise _refused(name_or_path, reference)
    print(tr("{path} brings its own code, which is run: {code}", path=name_or_path, code=reference))
    remote = get_class_from_dynamic_module(reference, name_or_path)
    return ModelSource(remote, is_remote=True)


def _refused(name_or_path: str, reference: str) -> UserError:
    return UserError(
        tr("only code that comes with the model knows its class: {code}", code=reference),
        hint=tr("if you trust it, set trust_remote_code=True where the model is loaded."),
        where=Where(name_or_path),
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
