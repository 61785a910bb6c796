"""Verification of models that were written from memory: they are loaded by their class again.

One model at a time is in memory, so what could be written can be verified.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from xtuner.export.verify import check_weights
from xtuner.export.verify_streamed import say_verified
from xtuner.model.reward_classes import HEAD

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from xtuner.export.trained_weights import TrainedWeights

Digests = Mapping[str, tuple[torch.dtype, bytes]]
"""Name of a tensor -> its dtype, and a digest of its shape and numbers."""


def digests_of(tensors: Mapping[str, Tensor], dtypes: Digests | None = None) -> Digests:
    """A digest of each tensor.

    Args:
        tensors: by name; each is read once.
        dtypes: round the tensors to the dtypes of these first.
    """
    found = {}
    for name in tensors:
        tensor = tensors[name].detach()
        if dtypes is not None and name in dtypes:
            tensor = tensor.to(dtypes[name][0])
        numbers = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        digest = hashlib.blake2b(f"{list(tensor.shape)}".encode())
        digest.update(numbers)
        found[name] = (tensor.dtype, digest.digest())
    return found


def check_reloaded(expected: Digests, load: Callable[[], nn.Module]) -> None:
    """Check that a model which was written has the tensors of the one in memory, to the bit.

    Args:
        expected: of the one that was in memory.
        load: loads what was written by the same class.

    Raises:
        UserError: naming the weights that are others.
    """
    found = digests_of(load().state_dict(), expected)
    wrong = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    _judge(wrong, len(found))


def check_trained_model(weights: TrainedWeights, model: PreTrainedModel) -> None:
    """Check a model that was loaded from what was written against the checkpoint, to the bit.

    Args:
        weights: the checkpoint's, of a language model or of a reward model.
        model: it may have fewer bits.

    Raises:
        UserError: naming the weights that are others.
    """
    prefix = f"{model.base_model_prefix}."

    def inner(name: str) -> str:
        """The name inside the body, which may be called otherwise in a classifier."""
        own = f"{HEAD}.weight" if name == "v_head.weight" else name.removeprefix("llm.")
        return own.removeprefix(prefix)

    body = [name for name in weights.infos if name.startswith(f"llm.{prefix}")]
    known = [*body, "v_head.weight"] if body and "v_head.weight" in weights.infos else weights.infos
    trained = {inner(name): name for name in known}  # a reward model has no head over tokens
    written = {inner(name): tensor for name, tensor in model.state_dict().items()}
    wrong = [
        name
        for name in {**trained, **written}
        if name not in trained
        or name not in written
        or not torch.equal(weights.read(trained[name]).to(written[name].dtype), written[name])
    ]
    _judge(wrong, len(written))


def _judge(wrong: list[str], count: int) -> None:
    check_weights(dict.fromkeys(wrong, torch.empty(0)), {}, torch.float32)
    say_verified(count)
