"""A language model of the user's own: transformers knows neither its class nor its config."""

from __future__ import annotations

from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "a_class_of_mine"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig


def make(path: str) -> OwnForCausalLM:
    """With random weights."""
    return OwnForCausalLM(OwnConfig.from_pretrained(path))


def load(path: str) -> OwnForCausalLM:
    """With the weights of a folder."""
    return OwnForCausalLM.from_pretrained(path)
