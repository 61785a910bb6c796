"""What the decoder-only models here have in common: the loop over layers, the call of the attention
function, and the output layer with its loss.

Names of modules differ from family to family, as they are the hub's; so a model tells its parts by
properties.

Shapes: B batch, S tokens, T keys, H width of the model, N heads, K key heads, D width of a head,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import (
    ALL_ATTENTION_FUNCTIONS,
    PreTrainedModel,
    slice_logits_to_keep,
)
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs


class DecoderPreTrainedModel(PreTrainedModel):
    """What the classes of a family share: they call attention by transformers' interface."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True


class DecoderModel:
    """The body of a decoder-only model: embedding, layers, norm; a mixin for a PreTrainedModel."""

    config: Any
    layers: Any
    norm: Any
    rotary_emb: Any
    get_input_embeddings: Any
    gradient_checkpointing = False
    output_class: Any = BaseModelOutputWithPast

    @property
    def decoder_layers(self) -> Iterable[nn.Module]:
        """The layers, in order."""
        return self.layers

    @property
    def final_norm(self) -> nn.Module:
        """What follows the last layer."""
        return self.norm

    def embed(self, input_ids: Tensor) -> Tensor:
        """(B, S) to (B, S, H)."""
        embedded: Tensor = self.get_input_embeddings()(input_ids)
        return embedded

    def default_position_ids(self, hidden_states: Tensor, past: int, mask: Tensor | None) -> Tensor:
        """(1, S) or (B, S) positions, where none are given.

        Args:
            hidden_states: (B, S, H).
            past: number of cached tokens.
            mask: the ``attention_mask`` as it came.
        """
        return torch.arange(past, past + hidden_states.shape[1], device=hidden_states.device)[None]

    def position_embeddings(
        self, hidden_states: Tensor, position_ids: Tensor, past_key_values: Cache | None
    ) -> Any:
        """What the layers get as ``position_embeddings``."""
        return self.rotary_emb(hidden_states, position_ids=position_ids)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: object,
    ) -> Any:
        """Compute the last hidden states.

        Args:
            input_ids: (B, S) token ids.
            attention_mask: (B, T), 0 at padding.
            position_ids: (B, S); 0, 1, 2, ... where None.
            past_key_values: keys and values of earlier tokens; the new ones are added.
            inputs_embeds: (B, S, H), in place of ``input_ids``.
            use_cache: make a cache if there is none.
            **kwargs: for the attention function, such as ``cu_seq_lens_q`` of packed rows.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if input_ids is not None:
            inputs_embeds = self.embed(input_ids)
        hidden_states = cast(Tensor, inputs_embeds)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
            position_ids = self.default_position_ids(hidden_states, past, attention_mask)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        positions = self.position_embeddings(hidden_states, position_ids, past_key_values)
        for layer in self.decoder_layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_ids=position_ids,
                position_embeddings=positions,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return self.output_class(
            last_hidden_state=self.final_norm(hidden_states), past_key_values=past_key_values
        )


class CausalLMModel:
    """A body with an output layer; a mixin for a PreTrainedModel."""

    config: Any
    base_model: Any
    loss_function: Any
    get_output_embeddings: Any

    def logits(self, hidden_states: Tensor) -> Tensor:
        """(..., H) to (..., V)."""
        logits: Tensor = self.get_output_embeddings()(hidden_states)
        return logits

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: object,
    ) -> CausalLMOutputWithPast:
        """Compute logits, and with ``labels`` their loss; arguments as ``DecoderModel``'s.

        Args:
            labels: (B, S) token ids, -100 where a token is not trained.
            logits_to_keep: only for so many of the last positions, or for these; 0: for all.
        """
        outputs = self.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.logits(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            size = self.config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    eager: Callable[..., Any] = eager_attention_forward,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Call the attention function that ``config._attn_implementation`` names.

    Args:
        module: the layer; it has ``config``, ``scaling`` and ``num_key_value_groups``.
        query: (B, N, S, D).
        key: (B, K, T, D).
        value: (B, K, T, D).
        attention_mask: as that function wants it.
        dropout: probability with which a score is dropped while training.
        eager: the function for ``eager``.
        **kwargs: for that function.

    Returns:
        (B, S, N * D), and the weights if that function gives them.
    """
    function = ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager)
    output, weights = function(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout if module.training else 0.0,
        scaling=module.scaling,
        **kwargs,
    )
    return output.flatten(2), weights


def split_heads(tensor: Tensor, width: int) -> Tensor:
    """(B, S, N * D) to (B, N, S, D)."""
    return tensor.unflatten(-1, (-1, width)).transpose(1, 2)


def cos_and_sin(position_ids: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary embeddings (Su et al., RoFormer, 2021), in float32.

    Args:
        position_ids: (B, S).
        frequencies: (D / 2,), or (B, S, D / 2) where they differ by token.

    Returns:
        Each (B, S, D); the second half repeats the first.
    """
    with torch.autocast(position_ids.device.type, enabled=False):
        angles = position_ids[..., None].float() * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def inverse_frequencies(width: int, base: float | Tensor, device: torch.device) -> Tensor:
    """(..., D / 2) angles per position: ``base ** (-2 i / D)``.

    Computed at each call, not kept in a buffer: loading leaves buffers that are not in the
    checkpoint uninitialised, and casts to 16 bits round them.

    Args:
        width: D, of the part of a head that is rotated.
        base: a number, or a tensor (..., 1) of them.
        device: where to.
    """
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    return 1.0 / base**exponents
