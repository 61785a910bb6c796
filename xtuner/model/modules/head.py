"""The output layer of a language model: its body's hidden states to logits, however it scales them.

Models differ in what they do around the last matrix (a factor, a soft cap). ``Head.of`` reads that
from the config; ``Head.agrees`` compares with the model's own logits, so that a model which does
something else is noticed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PROBE_TOKENS = 4
# Relative to the largest logit; bfloat16 keeps 8 bits.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Head:
    """What makes logits of hidden states.

    Args:
        module: the output layer.
        scale: factor on what it gives.
        softcap: bound that logits are bent towards by ``tanh``, or None.
    """

    module: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, llm: Any) -> Head:
        """The head of a causal language model of transformers (without an adapter around it)."""
        config = llm.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
        scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
        return cls(
            llm.get_output_embeddings(),
            float(scale),
            getattr(config, "final_logit_softcapping", None),
        )

    @property
    def linear(self) -> nn.Linear | None:
        """The linear layer in force, or None when the logits are more than one (LoRA on it)."""
        module: Any = self.module
        if hasattr(module, "modules_to_save"):  # peft's copy that is trained in its place
            if module.disable_adapters:
                module = module.original_module
            else:
                module = module.modules_to_save[module.active_adapters[0]]
        if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
            return None
        return module

    @property
    def weight(self) -> Tensor | None:
        """``(V, H)``; None when the head is not one plain linear layer."""
        return None if self.linear is None else self.linear.weight

    @property
    def bias(self) -> Tensor | None:
        """``(V,)``, or None."""
        return None if self.linear is None else self.linear.bias

    @property
    def vocab_size(self) -> int:
        """Number of logits of a position."""
        module: Any = self.module
        return int(getattr(module, "out_features", None) or module.weight.shape[0])

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states.

        Args:
            hidden: ``(..., H)``.

        Returns:
            ``(..., V)`` in the dtype of the computation.
        """
        weight: Any = getattr(self.module, "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point():
            hidden = hidden.to(weight.dtype)
        logits = self.module(hidden)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    @torch.no_grad()
    def agrees(self, llm: Any, body: nn.Module) -> bool:
        """Whether body and head give the logits that the model gives, tried on a few tokens."""
        mode = llm.training
        llm.eval()
        try:
            device = llm.get_input_embeddings().weight.device
            ids = torch.arange(1, PROBE_TOKENS + 1, device=device).unsqueeze(0)
            whole = llm(input_ids=ids, use_cache=False).logits
            ours = self(body(input_ids=ids, use_cache=False).last_hidden_state)
        finally:
            llm.train(mode)
        if whole.shape != ours.shape:
            return False
        bound = max(TOLERANCE.get(t.dtype, 4e-2) for t in (whole, ours))
        difference = (whole.float() - ours.float()).abs().max()
        return bool(difference <= bound * whole.float().abs().max().clamp(min=1e-3))
