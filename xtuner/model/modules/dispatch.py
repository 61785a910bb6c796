"""v0.1's ``dispatch_modules``: our attention in a model that was loaded without it."""

from __future__ import annotations

from transformers import PreTrainedModel


def dispatch_modules(model: PreTrainedModel, use_varlen_attn: bool = False) -> None:
    """Replace a model's attention function with ours, in place.

    The models of configs and of ``SupervisedFinetune`` have it already. v0.1.23 replaced the
    ``forward`` of each attention class; here transformers calls the function that is registered
    under the name in the model's config, so that it works for every class with such a switch.

    Args:
        model: a language model of transformers.
        use_varlen_attn: packed samples in a row, told apart by ``cu_seq_lens_q``, are to come.

    Raises:
        UserError: with ``use_varlen_attn``, for a model that would mix packed samples.
    """
    from xtuner.model.base import text_inputs
    from xtuner.model.modules import attention
    from xtuner.model.probe import ensure_exact_rows

    if getattr(model, "_supports_attention_backend", False):
        model.set_attn_implementation(attention.register())
    if use_varlen_attn:
        training = model.training
        model.eval()
        ensure_exact_rows(
            model,
            lambda batch: model(**text_inputs(batch), use_cache=False).logits,
            packed=True,
            padded=False,
        )
        model.train(training)
