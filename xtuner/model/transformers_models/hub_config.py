"""What the configurations of our classes share: they read and write what the hub's code does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

LOADING = ("attn_implementation", "_attn_implementation")
"""Keys of a folder's ``config.json`` by which its own code picks a class; ours does not."""


class HubConfig(PreTrainedConfig):
    """A configuration whose ``config.json`` the hub's own code, vLLM and LMDeploy can read.

    transformers 5 keeps the rotary embedding's settings in ``rope_parameters``, which that code
    does not know; they are written under the names it reads (see ``hub_rope``).
    """

    def __post_init__(self, **kwargs: Any) -> None:
        from xtuner.model.transformers_models.auto import register_models

        if kwargs.get("rope_scaling"):
            kwargs["rope_scaling"] = dict(kwargs["rope_scaling"])  # transformers adds keys to it
        super().__post_init__(**kwargs)
        register_models(type(self))

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: object) -> Any:
        """As transformers does, without the folder's choice of an attention class."""
        return super().from_dict(without_loading(config_dict), **kwargs)

    @property
    def torch_dtype(self) -> Any:
        """``dtype`` under the name that is saved; transformers' own property warns."""
        return self.dtype

    @torch_dtype.setter
    def torch_dtype(self, value: Any) -> None:
        self.dtype = value

    def to_dict(self) -> dict[str, Any]:
        """The fields as the hub's code names them."""
        return self.hub_fields(super().to_dict())

    def hub_fields(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields of a configuration of transformers under the names of the hub's code."""
        if fields.get("dtype") is not None:
            fields["torch_dtype"] = fields["dtype"]  # read by the versions that run the hub's code
        if fields.get("rope_parameters"):
            fields |= self.hub_rope(dict(fields.pop("rope_parameters")))
        return fields

    def hub_rope(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """The fields for ``rope_parameters``: here those of Llama before transformers 5.

        Args:
            parameters: ``rope_type``, ``rope_theta`` and the settings of that type.
        """
        theta, kind = parameters.pop("rope_theta"), parameters.pop("rope_type")
        parameters.pop("type", None)
        scaling = None if kind == "default" else {"type": kind, **parameters}
        return {"rope_theta": theta, "rope_scaling": scaling}


def without_loading(config_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A ``config.json`` without the keys in ``LOADING``."""
    return {key: value for key, value in config_dict.items() if key not in LOADING}
