"""The base class of all trainable models: body and head, forward, trained weights, export.

The contract with the training loop is in ``docs/architecture.md`` ("Model"): ``num_items`` counts
the denominators of a micro-batch's loss without computing it, and ``forward(mode='loss')`` returns
the micro-batch's share of the mean over ``num_items_in_batch``.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn

from xtuner.model.activation_checkpointing import enable_activation_checkpointing
from xtuner.model.backends import environment
from xtuner.model.backends.layers import Installed, install
from xtuner.model.backends.report import packs_in_one_call, report
from xtuner.model.loading import build_llm, resize_token_embeddings
from xtuner.model.lora import experts
from xtuner.model.lora.adapter_files import load_adapter
from xtuner.model.lora.targets import not_reached_by_text, set_default_targets
from xtuner.model.modules import attention
from xtuner.model.modules.chunks import require_own_temperatures, require_within_chunks
from xtuner.model.modules.loss import LogitTransform, shift_labels, supervised_positions
from xtuner.model.modules.saving import save_weights
from xtuner.model.modules.sequence_parallel import forward_sequence_parallel, require_agreement
from xtuner.model.modules.unpadding import unpadded
from xtuner.model.probe import ensure_exact_rows, probe_rows
from xtuner.parallel.sequence.groups import get_sequence_parallel_world_size
from xtuner.parallel.sequence.shard import SequenceShard
from xtuner.registry import BUILDER
from xtuner.utils.constants import IGNORE_INDEX
from xtuner.utils.errors import UserError, Where
from xtuner.utils.files import written_aside
from xtuner.utils.lang import tr
from xtuner.utils.types import Batch, Tokenizer

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig
    from transformers import PreTrainedModel
    from transformers.utils.generic import ModelOutput

PROBE_TOKENS = 8
AMPLIFIED = 100.0
"""The largest product of the head when its logits are compared: beyond any bound of them."""
logger = logging.getLogger(__name__)


class FinetuneModel(BaseModel):
    """A language model with or without an adapter.

    Args:
        llm: ``dict(type=AutoModelForCausalLM.from_pretrained, ...)`` or a built model.
        lora: ``dict(type=LoraConfig, ...)`` or a built peft config: trains an adapter only. Without
            ``target_modules`` every linear layer but the output layer gets one.
        peft_model: folder of an adapter to continue training, instead of a new one from ``lora``.
        use_activation_checkpointing: recompute activations in the backward pass instead of storing
            them; ``dict(every_n_layers=2, offload=True)`` for some layers, or from main memory, see
            ``Checkpointing``.
        use_varlen_attn: rows are packed; their samples do not see each other.
        tokenizer: the tokenizer; embeddings are resized for tokens that the model lacks.
        max_position_embeddings: extend the context to this length.
        compile: use torch.compile: on a CPU for element-wise kernels, on a GPU for whole layers. It
            needs a C++ compiler and takes 10 to 40 seconds at the first step. ``auto`` compiles on
            a CPU if the run is long enough for it to pay.
    """

    _separate_head: bool | None = None
    """Whether body and head can be called apart; None until the first batch."""
    _agrees_across_ranks = False
    probed_rows: frozenset[str] = frozenset()
    """Kinds of rows that the model was probed with: ``packed``, ``padded``, ``single``."""
    processor: Any = None
    """Of a vision-language model: its tokenizer, image processor and chat template."""
    unpads = False
    """Whether rows are computed as the samples of a packed one; found out at the first batch."""

    def __init__(
        self,
        llm: Mapping[str, Any] | nn.Module,
        lora: Mapping[str, Any] | PeftConfig | None = None,
        peft_model: str | None = None,
        use_activation_checkpointing: bool | Mapping[str, Any] = True,
        use_varlen_attn: bool = False,
        tokenizer: Mapping[str, Any] | Tokenizer | None = None,
        max_position_embeddings: int | None = None,
        compile: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        full = lora is None and peft_model is None
        self.llm = build_llm(llm, full=full, max_position_embeddings=max_position_embeddings)
        self.tokenizer = BUILDER.build(tokenizer) if isinstance(tokenizer, Mapping) else tokenizer
        self.use_varlen_attn = use_varlen_attn
        self.llm.config.use_cache = False
        resized = self.tokenizer is not None and resize_token_embeddings(self.llm, self.tokenizer)
        if not full:
            _add_adapter(self, lora, peft_model, resized)
            experts.quantize_experts(
                self.llm, getattr(self.llm.config, "quantization_config", None)
            )
        self._freeze_untrained()
        self.compiles = compile  # read when the run's length is known
        self.backends: list[Installed] = install(self.causal_lm, compiled=compile is True)
        enable_activation_checkpointing(self.causal_lm, use_activation_checkpointing)
        self.logit_transform = LogitTransform.of(self.llm.config)

    def _set_targets(self, config: LoraConfig) -> None:
        """Fill in what gets an adapter where a config does not say."""
        set_default_targets(config, self.llm)

    def _freeze_untrained(self) -> None:
        """Freeze the parts that rows do not reach."""
        for name in not_reached_by_text(self.causal_lm):
            self.causal_lm.get_submodule(name).requires_grad_(False)

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

    def forward(
        self,
        data: Batch,
        data_samples: object = None,
        mode: str = "loss",
        num_items_in_batch: Mapping[str, int] | None = None,
    ) -> Any:
        """Compute the loss, or the outputs.

        Args:
            data: a batch of the dataset's collate function, on the model's device: ``input_ids``
                and ``labels`` (B, S).
            data_samples: unused; mmengine passes it.
            mode: ``loss``; ``tensor`` for the output of the transformers model; ``predict`` for
                one dict of outputs in a list, ``[{'logits': (B, S, V)}]``.
            num_items_in_batch: denominators of the means, as ``num_items`` names them, of all
                micro-batches of a step; those of this micro-batch when None.

        Returns:
            With ``loss`` ``{'loss': scalar, ...}``: this micro-batch's share of the mean, and of
            what is logged beside it. Shares of all micro-batches and ranks add up.

        Raises:
            NotImplementedError: for another mode.
        """
        if mode == "loss":
            if num_items_in_batch is None:
                num_items_in_batch = self.num_items(data)
            return self.compute_loss(data, num_items_in_batch)
        if mode == "tensor":
            return self.compute_outputs(data)
        if mode == "predict":
            return [self.predict(data)]
        raise NotImplementedError(f"mode {mode!r}; there are: loss, predict, tensor")

    def prepare_batch(self, data: Batch, device: torch.device) -> Batch:
        """Prepare a batch for ``forward(mode='loss')``, before it is copied to a GPU.

        What would make the CPU wait for the GPU is found out here: where padding is, and at which
        positions there is a loss.

        Args:
            data: a batch of the collate function, on the CPU.
            device: where the model computes.

        Returns:
            The batch; on a GPU as one packed row, if the model ``unpads``.
        """
        rows = rows_for_gpu(self, data, device)
        return data if rows is None else {**rows, **find_supervised(rows)}

    def num_items(self, data: Batch) -> dict[str, int]:
        """Count the denominators of a micro-batch's loss, without computing it."""
        raise NotImplementedError

    def compute_loss(self, data: Batch, num_items_in_batch: Mapping[str, int]) -> dict[str, Tensor]:
        """Compute ``{'loss': scalar, ...}``; arguments and result as those of ``forward``."""
        raise NotImplementedError

    def compute_outputs(self, data: Batch) -> ModelOutput | Tensor:
        """Call the transformers model."""
        outputs: ModelOutput = self.llm(**self.inputs(data), use_cache=False)
        return outputs

    def predict(self, data: Batch) -> dict[str, Tensor]:
        """Compute ``{'logits': (B, S, V)}``."""
        outputs: Any = self.compute_outputs(data)
        return {"logits": outputs.logits}

    def hidden_states(self, data: Batch, shard: SequenceShard | None = None) -> Tensor:
        """Call the body, without the head, for its last hidden states.

        Args:
            data: a batch as ``default_collate_fn`` makes it, on the model's device.
            shard: this rank's shard of the rows; the rest is computed by other ranks.

        Returns:
            (B, S, H), S/N tokens with a ``shard``.
        """
        body, inputs = self.causal_lm.base_model, self.inputs(data)
        if shard is None:
            outputs: Any = body(**inputs, use_cache=False)
        else:
            outputs = forward_sequence_parallel(body, inputs, shard)
        hidden: Tensor = outputs.last_hidden_state
        return hidden

    def shard(self, data: Batch) -> SequenceShard:
        """The part of a batch that this rank computes: all of it, unless ranks share rows.

        Raises:
            UserError: at the first batch, when the model cannot compute packed, padded or shared
                rows exactly; for a sample longer than the chunks of chunked attention.
        """
        _probe_first_batch(self, data)
        rows = data["input_ids"] if "input_ids" in data else data["inputs_embeds"]
        packed = packed_cu_seqlens(data) is not None
        require_within_chunks(self.causal_lm, int(data["max_seqlen"]) if packed else rows.shape[1])
        if packed or get_sequence_parallel_world_size() > 1:
            require_own_temperatures(self.causal_lm, rows.shape[1])
        counts_padding = getattr(self.llm.config, "output_router_logits", False)
        waits = environment.waits_for(rows.device)
        bucketed = not waits and packed and not counts_padding and not data.get("images")
        shard = SequenceShard(rows.shape[1], bucketed=bucketed)
        if shard.size > 1 and not self._agrees_across_ranks:
            training = self.training
            self.eval()
            try:
                require_agreement(self.causal_lm, self.causal_lm.base_model, rows)
            finally:
                self.train(training)
            self._agrees_across_ranks = True
        return shard

    def generate(self, input_ids: Tensor, **settings: Any) -> Tensor:
        """Continue a text; arguments and result as ``generate`` of transformers."""
        answer: Tensor = self.llm.generate(input_ids=input_ids, **settings)
        return answer

    def can_skip_logits(self, data: Batch) -> bool:
        """Whether body and head can be called apart: found out once, by comparing the logits."""
        if getattr(self.llm.config, "output_router_logits", False):
            return False
        if self._separate_head is None:
            self._separate_head = _head_agrees(self, data)
            if not self._separate_head:
                logger.warning(
                    tr(
                        "%s computes its logits by code of its own: the loss is computed from all "
                        "of them, which takes more memory."
                    ),
                    type(self.causal_lm).__name__,
                )
        return self._separate_head

    def inputs(self, data: Batch) -> dict[str, Any]:
        """The arguments of the transformers model, see ``text_inputs``."""
        return text_inputs(data)

    def state_dict(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """The weights that are trained: the adapter's where there is one, otherwise all."""
        state: dict[str, Tensor] = super().state_dict(*args, **kwargs)
        if not self.has_adapter:
            return state
        return trained_weights(self, state, prefix=str(kwargs.get("prefix", "")))

    def backends_report(self, dtype: torch.dtype | None = None) -> list[tuple[str, str, str]]:
        """Which implementation computes what.

        Args:
            dtype: of autocast; that of the weights when None.

        Returns:
            (what is computed, the implementation, why it is not a faster one) of each; the reason
            is empty for the fastest.
        """
        if dtype is None:
            dtype = next(self.causal_lm.parameters()).dtype
        return report(
            self.causal_lm,
            self.backends,
            dtype,
            packed=self.use_varlen_attn,
            separate_head=self._separate_head is not False,
        )

    def to_hf(
        self,
        save_dir: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        safe_serialization: bool = True,
        max_shard_size: int | str = "2GB",
    ) -> None:
        """Write the model, or its adapter, as a Hugging Face folder.

        Args:
            save_dir: the folder.
            dtype: of the weights; as they are when None.
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
                save_weights(self.llm, aside, weights, dtype, max_shard_size)
            beside: Any = self.processor or self.tokenizer
            if beside is not None:
                beside.save_pretrained(aside)


def _add_adapter(
    model: FinetuneModel,
    lora: Mapping[str, Any] | PeftConfig | None,
    peft_model: str | None,
    resized: bool,
) -> None:
    from peft import get_peft_model

    if peft_model is not None:
        model.llm = load_adapter(model.llm, peft_model, is_trainable=True)
        return
    config: Any = BUILDER.build(lora) if isinstance(lora, Mapping) else lora
    model._set_targets(config)
    if resized:
        _train_embeddings(config, model.llm)
    _require_tokens(config, model.llm)
    experts.disable_expert_lora_dropout(config, model.llm)
    model.llm = get_peft_model(model.llm, config)


def _require_tokens(config: PeftConfig, llm: PreTrainedModel) -> None:
    """Refuse ``trainable_token_indices`` that the embedding has no rows for."""
    given = getattr(config, "trainable_token_indices", None) or []
    lists = list(given.values()) if isinstance(given, Mapping) else [given]
    embedding: Any = llm.get_input_embeddings()
    rows = embedding.weight.shape[0]
    wrong = [index for indices in lists for index in indices if not 0 <= index < rows]
    if wrong:
        raise UserError(
            tr(
                "there is no token {index}: the embedding has {rows} rows.",
                index=wrong[0],
                rows=rows,
            ),
            where=Where(key="model.lora.trainable_token_indices"),
        )


def _train_embeddings(config: Any, llm: PreTrainedModel) -> None:
    """Train and save embeddings and head with the adapter: new tokens are learned there.

    Raises:
        UserError: when the config trains single tokens, whose adapter lacks the new rows.
    """
    if getattr(config, "trainable_token_indices", None):
        raise UserError(
            tr("the tokenizer has tokens that the model lacks: all embeddings are trained."),
            hint=tr("remove trainable_token_indices, or the tokens."),
            where=Where(key="model.lora.trainable_token_indices"),
        )
    layers = [llm.get_input_embeddings(), llm.get_output_embeddings()]
    names = [name for name, module in llm.named_modules() if module in layers]
    leaves = {name.rpartition(".")[2] for name in names}
    config.modules_to_save = sorted({*(config.modules_to_save or ()), *leaves})


def trained_weights(
    model: nn.Module,
    state: Mapping[str, Tensor],
    prefix: str = "",
    more: Collection[str] = (),
) -> dict[str, Tensor]:
    """The entries of a model's state dict, named with a ``prefix``: those trained, and ``more``."""
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad} | {*more}
    return {name: value for name, value in state.items() if name.removeprefix(prefix) in trained}


def _probe_first_batch(model: FinetuneModel, data: Batch) -> None:
    """Probe the model, and a reference beside it, with the first batch of each kind."""
    mask = data.get("attention_mask")
    kind = "single" if mask is None or len(mask) == 1 else "padded"
    if packed_cu_seqlens(data) is not None:
        kind = "packed"
    if kind in model.probed_rows:
        return
    model.probed_rows |= {kind}
    training = model.training
    model.eval()  # dropout would make two calls differ
    try:
        for llm in filter(None, (model.causal_lm, getattr(model, "ref_llm", None))):
            forward = functools.partial(outputs_of, model, llm)
            ensure_exact_rows(llm, forward, packed=kind == "packed", padded=kind == "padded")
        if kind != "packed" and _packs_as_well(model, data):
            model.unpads = True
            model.probed_rows |= {"packed"}
    finally:
        model.train(training)


class _Amplify:
    """A hook that scales a head's outputs by one factor, so that a bound of the logits shows."""

    factor: float | None = None

    def __call__(self, head: nn.Module, args: object, output: Tensor) -> Tensor:
        if self.factor is None:
            self.factor = AMPLIFIED / max(float(output.abs().max()), 1e-12)
        return output * self.factor


@torch.no_grad()
def _head_agrees(model: FinetuneModel, data: Batch) -> bool:
    """Whether the head, called apart, gives the logits that the model gives for a few tokens.

    What the class does to its logits is chosen here: what its config says, what the config of its
    language model says, or nothing.
    """
    if model.head is None or model.causal_lm.base_model is model.causal_lm:
        return False
    name: Literal["inputs_embeds", "input_ids"]
    name = "inputs_embeds" if "inputs_embeds" in data else "input_ids"
    probe = {name: data[name][:1, :PROBE_TOKENS]}
    training = model.training
    model.eval()  # dropout would make two calls differ
    amplify = _Amplify()
    hook = model.head.register_forward_hook(amplify)
    try:
        theirs = model.llm(**probe, use_cache=False).logits.float()
        if amplify.factor is None:  # the class multiplies by the head's weight itself
            hook.remove()
        hidden = model.causal_lm.base_model(**probe, use_cache=False).last_hidden_state
        products = model.head(hidden).float()
    finally:
        hook.remove()
        model.train(training)
    exact = hidden.dtype == torch.float32 and not torch.is_autocast_enabled(hidden.device.type)
    bound = 1e-4 if exact else 1e-2
    of_text = LogitTransform.of(model.llm.config.get_text_config())
    for transform in (model.logit_transform, of_text, LogitTransform()):
        ours = transform(products)
        if ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=bound, atol=bound):
            model.logit_transform = transform
            return True
    return False


def _packs_as_well(model: FinetuneModel, data: Batch) -> bool:
    """Whether rows are exact, and one call of a kernel, as packed ones on this device."""
    ids = data.get("input_ids")
    if ids is None or not environment.waits_for(ids.device):
        return False
    kind = ids.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    for llm in filter(None, (model.causal_lm, getattr(model, "ref_llm", None))):
        if not packs_in_one_call(llm, dtype or llm.dtype):
            return False
        forward = functools.partial(outputs_of, model, llm)
        vocabulary = llm.config.get_text_config().vocab_size
        try:
            probe = probe_rows(forward, vocabulary, ids.device, packed=True, padded=False)
        except UserError:  # it cannot compute packed rows
            return False
        if not probe.packs_exactly:
            return False
    return True


def outputs_of(model: FinetuneModel, llm: PreTrainedModel, data: Batch) -> Tensor:
    """What the loss is computed from: hidden states (B, S, H), or logits (B, S, V)."""
    outputs: Tensor
    if model.can_skip_logits(data):
        outputs = llm.base_model(**model.inputs(data), use_cache=False).last_hidden_state
    else:
        outputs = llm(**model.inputs(data), use_cache=False).logits
    return outputs


def use_our_attention(model: FinetuneModel) -> bool:
    """Whether a model, and a reference beside it, take packed samples from ``cu_seq_lens``."""
    llms = filter(None, (model.causal_lm, getattr(model, "ref_llm", None)))
    return all(llm.config._attn_implementation == attention.NAME for llm in llms)


def rows_for_gpu(model: FinetuneModel, data: Batch, device: torch.device) -> Batch | None:
    """The rows of a batch as a model computes them on a GPU; None on another device."""
    if not environment.waits_for(device) or get_sequence_parallel_world_size() > 1:
        return None
    padded = "attention_mask" in data and not data.get("images")
    rows = unpadded(data) if model.unpads and padded else data
    if packed_cu_seqlens(rows) is None or not use_our_attention(model):
        return rows
    # without a mask transformers looks for samples in the position ids, and waits
    mask = torch.ones(rows["input_ids"].shape, dtype=torch.bool)
    return {**rows, "sample_mask": mask}


def find_supervised(data: Batch) -> Batch:
    """The field ``supervised`` of a batch."""
    targets = shift_labels(data["labels"], packed_cu_seqlens(data), data.get("attention_mask"))
    return {"supervised": supervised_positions(targets)}


def supervised(data: Batch, shard: SequenceShard) -> tuple[Tensor, Tensor]:
    """Where there is a loss in this rank's shard, and what is predicted there.

    Returns:
        (N,) positions in the flattened shard, and (N,) token ids.
    """
    if "supervised" in data:  # of whole rows, found on the CPU
        positions, targets = data["supervised"]
        return positions, targets
    targets = shift_labels(data["labels"], packed_cu_seqlens(data), data.get("attention_mask"))
    positions, targets = supervised_positions(shard.shard(targets, IGNORE_INDEX))
    return positions, targets


def text_inputs(data: Batch) -> dict[str, Any]:
    """The arguments of the transformers model; ``cu_seq_lens_q`` etc. for packed rows.

    Raises:
        UserError: when there are images.
    """
    if data.get("images"):
        raise UserError(
            tr("the rows have images, and this model is trained on text alone."),
            hint=tr("set model.type to VisionLanguageFinetune."),
            where=Where(key="model.type"),
        )
    names = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
    inputs: dict[str, Any] = {
        name: value for name, value in data.items() if name in names and value is not None
    }
    cu_seqlens = packed_cu_seqlens(data)
    if cu_seqlens is None and {"attention_mask", "position_ids"} <= inputs.keys():
        inputs["position_ids"] = _within_rows(inputs["position_ids"], inputs["attention_mask"])
    if cu_seqlens is not None:
        inputs.pop("attention_mask", None)
        longest = int(data["max_seqlen"])
        inputs |= {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
        inputs |= {"max_length_q": longest, "max_length_k": longest}
        if "sample_mask" in data:
            inputs["attention_mask"] = data["sample_mask"]
    return inputs


def _within_rows(position_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, S) positions of which none is larger than those of the row's own tokens.

    Rotary embeddings that are scaled by the length take it from the largest position of a row.
    """
    if position_ids.shape != attention_mask.shape:
        return position_ids
    last = position_ids.masked_fill(attention_mask == 0, 0).amax(1, keepdim=True)
    return position_ids.minimum(last)


def packed_cu_seqlens(data: Batch) -> Tensor | None:
    """(samples + 1,) int32 cumulative lengths of a packed row; None for an ordinary batch."""
    cu_seqlens = data.get("cumulative_len")
    if isinstance(cu_seqlens, list | tuple):
        (only,) = cu_seqlens  # a batch of packed rows has one row
        return only
    return cu_seqlens
