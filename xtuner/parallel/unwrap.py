"""The model inside the wrapper that distributes it."""

from __future__ import annotations

from typing import cast

from mmengine.model import is_model_wrapper
from torch import nn


def unwrap_model(model: nn.Module) -> nn.Module:
    """The model without ``DistributedDataParallel`` or DeepSpeed's engine around it."""
    return cast(nn.Module, model.module) if is_model_wrapper(model) else model
