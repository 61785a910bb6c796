"""``MixtralForCausalLM`` and its config under the import path of v0.1."""

from transformers import MixtralConfig
from transformers import MixtralForCausalLM as _MixtralForCausalLM

from xtuner.model.transformers_models.experts import PublishedExperts

__all__ = ["MixtralConfig", "MixtralForCausalLM"]


class MixtralForCausalLM(PublishedExperts, _MixtralForCausalLM):  # type: ignore[misc]
    """transformers' class, with the keywords that published configs hand over."""
