"""What all trained models share: a language model inside, packed forward, saving, exporting.

A subclass says what its loss is (``compute_loss``) and what that is divided by (``count_items``).
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.model import BaseModel
from peft import PeftModel
from torch import Tensor, nn

from xtuner.model.loading import add_adapter, base_of, build_llm, grow_vocabulary
from xtuner.model.modules import attention
from xtuner.model.modules.head import Head
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

# What a batch carries beside the arguments of the language model.
NOT_FOR_THE_MODEL = ("labels", "cumulative_len", "max_seqlen", "rows")


class FinetuneModel(BaseModel):
    """A language model, whole or with an adapter, in training.

    Args:
        llm: config dict or model.
        lora: config dict or ``LoraConfig``; None for full training.
        peft_model: folder of an adapter to go on from.
        use_activation_checkpointing: recompute each layer in the backward instead of keeping what
            it computed: less memory, about a third more time.
        use_varlen_attn: rows are packed and carry the borders of their samples.
        tokenizer: config dict or tokenizer; the model gets rows for tokens it lacks.
        max_position_embeddings: context length to stretch the positions to.
    """

    def __init__(
        self,
        llm: Any,
        lora: Any = None,
        peft_model: str | None = None,
        use_activation_checkpointing: bool = True,
        use_varlen_attn: bool = False,
        tokenizer: Any = None,
        max_position_embeddings: int | None = None,
    ) -> None:
        super().__init__()
        self.use_varlen_attn = use_varlen_attn
        self.use_lora = lora is not None or peft_model is not None
        model: Any = build_llm(
            llm, trained=not self.use_lora, max_position_embeddings=max_position_embeddings
        )
        if use_varlen_attn:
            attention.require_borders(base_of(model))
        grown = tokenizer is not None and grow_vocabulary(base_of(model), tokenizer)
        if self.use_lora:
            model = add_adapter(model, lora, peft_model, grown=grown)
        self.llm = model
        self.use_activation_checkpointing = use_activation_checkpointing
        if use_activation_checkpointing:
            self.activation_checkpointing_enable()
        self._head: Head | None = None

    @abstractmethod
    def count_items(self, data: Mapping[str, Any]) -> dict[str, int]:
        """What the loss of a micro-batch is divided by, counted without a forward."""

    @abstractmethod
    def compute_loss(
        self, data: Mapping[str, Any], totals: Mapping[str, int]
    ) -> dict[str, Tensor]:
        """This micro-batch's share of the mean over ``totals``, under ``loss``, and what to log."""

    def forward(
        self,
        data: Mapping[str, Any],
        data_samples: Any = None,
        mode: str = "loss",
        totals: Mapping[str, int] | None = None,
    ) -> Any:
        """Compute the loss, or the language model's own output.

        Args:
            data: the batch.
            data_samples: of no use; mmengine's interface has it.
            mode: ``loss``, or ``tensor`` or ``predict`` for the model's own output with logits.
            totals: what losses are divided by; the micro-batch's own counts when None.
        """
        if mode == "loss":
            if totals is None:
                totals = {name: max(1, n) for name, n in self.count_items(data).items()}
            return self.compute_loss(data, totals)
        if mode in ("tensor", "predict"):
            with self._borders_in_force(data):
                return self.llm(**self.model_inputs(data))
        raise ValueError(f"no such mode: {mode!r}")

    def model_inputs(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the language model that a batch stands for."""
        inputs = {name: value for name, value in data.items() if name not in NOT_FOR_THE_MODEL}
        inputs["use_cache"] = False
        borders = self.borders(data)
        if borders is not None:
            longest = data.get("max_seqlen")
            if longest is None:
                longest = int((borders[1:] - borders[:-1]).max())
            inputs["attention_mask"] = None
            for side in ("q", "k"):
                inputs[f"cu_seq_lens_{side}"] = borders
                inputs[f"max_length_{side}"] = int(longest)
        return inputs

    @staticmethod
    def borders(data: Mapping[str, Any]) -> Tensor | None:
        """Borders of the samples in a packed row, ``(num_samples + 1,)``; None for other batches.

        Raises:
            UserError: when there is more than one packed row.
        """
        borders = data.get("cumulative_len")
        if borders is None:
            return None
        rows = [borders] if isinstance(borders, Tensor) else list(borders)
        if len(rows) != 1:
            raise UserError(
                tr(
                    f"use_varlen_attn takes one packed row at a time; this batch has {len(rows)}.",
                    f"use_varlen_attn 一次只接受一行打包数据，而这个 batch 有 {len(rows)} 行。",
                ),
                hint=tr(
                    "set batch_size = 1 and multiply accumulative_counts or max_length instead.",
                    "请设置 batch_size = 1，改为增大 accumulative_counts 或 max_length。",
                ),
                where=Where(key="train_dataloader.batch_size"),
            )
        return rows[0].to(torch.int32)

    def _borders_in_force(self, data: Mapping[str, Any]) -> contextlib.AbstractContextManager[None]:
        packed = data.get("cumulative_len") is not None
        return attention.packed_rows() if packed else contextlib.nullcontext()

    def hidden_states(self, data: Mapping[str, Any]) -> Tensor:
        """The body's output for a batch, ``(B, S, H)``: what the head makes logits of."""
        with self._borders_in_force(data):
            return self.body(**self.model_inputs(data)).last_hidden_state

    @property
    def body(self) -> nn.Module:
        """The language model without its head, adapters in place."""
        return base_of(self.llm).get_decoder()

    @property
    def head(self) -> Head:
        """The output layer.

        Raises:
            UserError: when the model does more between its body and its logits than is known here.
        """
        if self._head is None:
            base = base_of(self.llm)
            head = Head.of(base)
            if not head.agrees(base, self.body):
                raise UserError(
                    tr(
                        f"{type(base).__name__} makes its logits in a way that is not known here.",
                        f"{type(base).__name__} 计算 logits 的方式不受支持。",
                    ),
                    where=Where(key="model.llm"),
                )
            self._head = head
        return self._head

    def activation_checkpointing_enable(self) -> None:
        """Recompute each layer in the backward."""
        base_of(self.llm).gradient_checkpointing_enable({"use_reentrant": False})

    def activation_checkpointing_disable(self) -> None:
        """Keep what each layer computes for the backward."""
        base_of(self.llm).gradient_checkpointing_disable()

    gradient_checkpointing_enable = activation_checkpointing_enable
    gradient_checkpointing_disable = activation_checkpointing_disable

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """What is trained: everything, or the adapter and ``modules_to_save``."""
        whole = super().state_dict(*args, **kwargs)
        if not self.use_lora:
            return whole
        prefix = kwargs.get("prefix", "")
        trained = {prefix + n for n, p in self.named_parameters() if p.requires_grad}
        for name in list(whole):
            if name not in trained:
                del whole[name]
        return whole

    def to_hf(
        self,
        save_dir: str | Path,
        dtype: torch.dtype | None = None,
        safe_serialization: bool = True,
        max_shard_size: str | int = "2GB",
        **settings: Any,
    ) -> None:
        """Write a Hugging Face folder: the whole model, or a peft adapter.

        Args:
            save_dir: the folder.
            dtype: of the floating-point tensors; as they are when None.
            safe_serialization: safetensors, or else ``.bin`` for an adapter.
            max_shard_size: size of a shard of a whole model.
            settings: further keywords of ``save_pretrained``.
        """
        llm: Any = self.llm
        if isinstance(llm, PeftModel):
            from peft import get_peft_model_state_dict

            state = get_peft_model_state_dict(llm, save_embedding_layers=False)
            llm.save_pretrained(
                str(save_dir),
                state_dict=_cast(llm.state_dict(), set(), dtype) if dtype else None,
                safe_serialization=safe_serialization,
                save_embedding_layers=False,
                **settings,
            )
            del state
            return
        config = llm.config
        kept = (config.use_cache, config.dtype)
        config.use_cache = True
        config.dtype = dtype or llm.dtype
        try:
            llm.save_pretrained(
                str(save_dir),
                state_dict=_cast(llm.state_dict(), set(), dtype) if dtype else None,
                max_shard_size=max_shard_size,
                **settings,
            )
        finally:
            config.use_cache, config.dtype = kept

    def __getattr__(self, name: str) -> Any:
        """Look in the language model for what this one lacks (``config``, ``generate``, ...)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "llm" or "llm" not in self._modules:
                raise
            return getattr(self.llm, name)


def _cast(state: Mapping[str, Tensor], leave: set[str], dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        name: value.to(dtype) if value.is_floating_point() and name not in leave else value
        for name, value in state.items()
    }
