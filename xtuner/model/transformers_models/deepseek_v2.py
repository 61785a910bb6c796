"""``DeepseekV2ForCausalLM`` and its config under the import path of v0.1."""

from transformers import DeepseekV2Config
from transformers import DeepseekV2ForCausalLM as _DeepseekV2ForCausalLM

from xtuner.model.transformers_models.experts import PublishedExperts

__all__ = ["DeepseekV2Config", "DeepseekV2ForCausalLM"]


class DeepseekV2ForCausalLM(PublishedExperts, _DeepseekV2ForCausalLM):  # type: ignore[misc]
    """transformers' class, with the keywords that published configs hand over."""
