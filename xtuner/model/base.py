"""What every trainable model shares: its body and head, its trained weights, its way out.

The contract with the loop is in ``docs/architecture.md`` ("Model"): ``num_items`` gives the
denominators of a micro-batch's loss without computing it, and ``forward(mode='loss', totals=...)``
gives the micro-batch's share of the mean over ``totals``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any, Literal

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn

from xtuner.model.backends.cpu import fused_layers, linear
from xtuner.model.backends.gpu import compiled, liger
from xtuner.model.loading import build_llm, require_varlen_support, resize_token_embeddings
from xtuner.model.lora import experts, fast_lora
from xtuner.model.lora.targets import set_default_targets
from xtuner.model.modules.loss import LogitTransform
from xtuner.model.modules.sequence_parallel import forward_sequence_parallel, require_agreement
from xtuner.parallel.sequence.shard import SequenceShard
from xtuner.registry import BUILDER
from xtuner.utils.files import written_aside

Data = dict[str, Any]
PROBE_TOKENS = 8
logger = logging.getLogger(__name__)


class FinetuneModel(BaseModel):
    """A language model with or without an adapter.

    Args:
        llm: ``dict(type=AutoModelForCausalLM.from_pretrained, ...)`` or a built model.
        lora: ``dict(type=LoraConfig, ...)`` or a built peft config: trains an adapter only. Without
            ``target_modules`` every linear layer but the output layer gets one.
        peft_model: folder of an adapter to go on training, instead of ``lora``'s fresh one.
        use_activation_checkpointing: compute activations twice instead of keeping them.
        use_varlen_attn: rows are packed; their samples do not see each other.
        tokenizer: the tokenizer; the model grows rows for tokens that it lacks.
        max_position_embeddings: length to stretch the model to.
        compile: use torch.compile: on a CPU for the steps between the products, on a GPU for whole
            layers. It needs a C++ compiler and takes 10 to 40 seconds at the first step. ``auto``
            compiles on a CPU if the run is long enough for it to pay.
    """

    _knows_head: bool | None = None
    _shares_rows = False

    def __init__(
        self,
        llm: Any,
        lora: Any = None,
        peft_model: str | None = None,
        use_activation_checkpointing: bool = True,
        use_varlen_attn: bool = False,
        tokenizer: Any = None,
        max_position_embeddings: int | None = None,
        compile: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        full = lora is None and peft_model is None
        self.llm = build_llm(llm, full=full, max_position_embeddings=max_position_embeddings)
        self.tokenizer = BUILDER.build(tokenizer) if isinstance(tokenizer, Mapping) else tokenizer
        self.use_varlen_attn = use_varlen_attn
        if use_varlen_attn:
            require_varlen_support(self.llm)
        self.llm.config.use_cache = False
        grown = self.tokenizer is not None and resize_token_embeddings(self.llm, self.tokenizer)
        if not full:
            self._add_adapter(lora, peft_model, grown)
            experts.quantize_experts(
                self.llm, getattr(self.llm.config, "quantization_config", None)
            )
        self.compiles = compile  # read when the run's length is known
        if compile is True and torch.cuda.is_available():
            # which joins the steps of plain modules better than ours can be
            compiled.compile_layers(self.causal_lm)
        else:
            fused_layers.apply_fused_layers(self.llm)
            linear.apply_fused_linear(self.llm)
            liger.speed_up(self.causal_lm)
            if not full:
                fast_lora.speed_up(self.llm)
        if use_activation_checkpointing:
            self.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        self.rule = LogitTransform.of(self.llm.config)

    def _add_adapter(self, lora: Any, peft_model: str | None, grown: bool) -> None:
        from peft import PeftModel, get_peft_model

        if peft_model is not None:
            self.llm = PeftModel.from_pretrained(self.llm, peft_model, is_trainable=True)
            return
        config = BUILDER.build(lora) if isinstance(lora, Mapping) else lora
        set_default_targets(config, self.llm)
        if grown:
            self._train_new_rows(config)
        experts.disable_expert_lora_dropout(config, self.llm)
        self.llm = get_peft_model(self.llm, config)

    def _train_new_rows(self, config: Any) -> None:
        """New tokens can only be learnt, and kept, if the layers that hold them are trained."""
        layers = [self.llm.get_input_embeddings(), self.llm.get_output_embeddings()]
        names = [name for name, module in self.llm.named_modules() if module in layers]
        leaves = {name.rpartition(".")[2] for name in names}
        config.modules_to_save = sorted({*(config.modules_to_save or ()), *leaves})

    @property
    def has_adapter(self) -> bool:
        return hasattr(self.llm, "peft_config")

    @property
    def causal_lm(self) -> Any:
        """The transformers model itself, its layers wrapped where there is an adapter."""
        return self.llm.get_base_model() if self.has_adapter else self.llm

    @property
    def head(self) -> nn.Module:
        """The layer from hidden states to logits."""
        return self.causal_lm.get_output_embeddings()

    def hidden_states(self, data: Mapping[str, Any], share: SequenceShard | None = None) -> Any:
        """Run the body, without the head.

        Args:
            data: a batch as ``default_collate_fn`` makes it, on the model's device.
            share: this rank's stretch of the rows, of which the rest is left to other ranks.

        Returns:
            The body's output; ``last_hidden_state`` is (B, S, H), S/N tokens with a ``share``.
        """
        inputs = self.inputs(data)
        if share is None:
            return self.causal_lm.base_model(**inputs, use_cache=False)
        return forward_sequence_parallel(self.causal_lm.base_model, inputs, share)

    def share(self, data: Mapping[str, Any]) -> SequenceShard:
        """What this rank computes of a batch for the loss: everything, unless ranks share rows.

        Raises:
            UserError: when ranks share rows, and this model cannot be computed so.
        """
        rows = data["input_ids"] if "input_ids" in data else data["inputs_embeds"]
        counts_all = getattr(self.llm.config, "output_router_logits", False)  # padding, too
        rounds = rows.is_cpu and packed_cu_seqlens(data) is not None and not counts_all
        share = SequenceShard(rows.shape[1], rounds=rounds)
        if share.size > 1 and not self._shares_rows:
            training = self.training
            self.eval()
            try:
                require_agreement(self.causal_lm, self.causal_lm.base_model, rows)
            finally:
                self.train(training)
            self._shares_rows = True
        return share

    def generate(self, input_ids: Tensor, **settings: Any) -> Tensor:
        """Go on with a text; arguments and result as ``generate`` of transformers."""
        answer: Tensor = self.llm.generate(input_ids=input_ids, **settings)
        return answer

    def can_skip_logits(self, data: Data) -> bool:
        """Whether head and body can be called apart: asked once, by comparing the logits."""
        if getattr(self.llm.config, "output_router_logits", False):
            return False
        if self._knows_head is None:
            self._knows_head = self._head_agrees(data)
            if not self._knows_head:
                logger.warning(
                    "%s makes its logits in its own way: the loss is computed from all of them, "
                    "which takes more memory.",
                    type(self.causal_lm).__name__,
                )
        return self._knows_head

    @torch.no_grad()
    def _head_agrees(self, data: Data) -> bool:
        if self.head is None or self.causal_lm.base_model is self.causal_lm:
            return False
        name = "inputs_embeds" if "inputs_embeds" in data else "input_ids"
        probe = {name: data[name][:1, :PROBE_TOKENS]}
        training = self.training
        self.eval()  # dropout would make two calls differ
        try:
            theirs = self.llm(**probe, use_cache=False).logits.float()
            hidden = self.causal_lm.base_model(**probe, use_cache=False).last_hidden_state
            ours = self.rule(self.head(hidden).float())
        finally:
            self.train(training)
        return ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2)

    @staticmethod
    def inputs(data: Mapping[str, Any]) -> dict[str, Any]:
        """What the transformers model is called with; packed rows bring their borders."""
        names = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
        inputs = {name: data[name] for name in names if data.get(name) is not None}
        borders = packed_cu_seqlens(data)
        if borders is not None:
            inputs.pop("attention_mask", None)  # the borders say it all
            longest = int(data["max_seqlen"])
            inputs |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
            inputs |= {"max_length_q": longest, "max_length_k": longest}
        return inputs

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The weights that are trained: the adapter's where there is one, otherwise all."""
        state = super().state_dict(*args, **kwargs)
        if not self.has_adapter:
            return state
        trained = {name for name, weight in self.named_parameters() if weight.requires_grad}
        prefix = str(kwargs.get("prefix", ""))
        return {
            name: value for name, value in state.items() if name.removeprefix(prefix) in trained
        }

    def to_hf(
        self,
        save_dir: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        safe_serialization: bool = True,
        max_shard_size: str = "2GB",
    ) -> None:
        """Write the model, or its adapter, as a Hugging Face folder.

        Args:
            save_dir: the folder.
            dtype: number format of the weights; as they are when None.
            safe_serialization: kept from v0.1; transformers 5 and peft write safetensors only.
            max_shard_size: of a file of a whole model.
        """
        weights = self.llm.state_dict()
        if self.has_adapter:
            from peft import get_peft_model_state_dict

            weights = get_peft_model_state_dict(self.llm)
        if dtype is not None:
            weights = {
                name: value.to(dtype) if value.is_floating_point() else value
                for name, value in weights.items()
            }
        with written_aside(save_dir) as aside:
            if self.has_adapter:
                from safetensors.torch import save_file

                aside.mkdir()
                self.llm.peft_config[self.llm.active_adapter].save_pretrained(str(aside))
                plain = {name: value.contiguous().cpu() for name, value in weights.items()}
                save_file(plain, aside / "adapter_model.safetensors", metadata={"format": "pt"})
            else:
                self.llm.save_pretrained(aside, state_dict=weights, max_shard_size=max_shard_size)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(aside)


def packed_cu_seqlens(data: Mapping[str, Any]) -> Tensor | None:
    """(samples + 1,) int32 borders of a packed row, or None for an ordinary batch."""
    borders = data.get("cumulative_len")
    if borders is None:
        return None
    if isinstance(borders, list | tuple):
        (borders,) = borders  # a batch of packed rows has one row
    return borders
