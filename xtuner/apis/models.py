"""Language models for full, LoRA and QLoRA training, and their tokenizers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xtuner.utils.errors import require

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig


def build_model(model_name_or_path: str, return_tokenizer: bool = True, **settings: object) -> Any:
    """Load a language model for full training.

    Args:
        model_name_or_path: a folder or a hub name.
        return_tokenizer: whether to return the tokenizer as well.
        settings: further keyword arguments of ``AutoModelForCausalLM.from_pretrained``.

    Returns:
        ``(model, tokenizer)``, or the model alone.
    """
    from xtuner.model.transformers_models.auto import AutoModelForCausalLM

    settings.setdefault("trust_remote_code", True)
    model: Any = AutoModelForCausalLM.from_pretrained(model_name_or_path, **settings)
    model.config.use_cache = False
    return (model, _tokenizer(model_name_or_path)) if return_tokenizer else model


def build_lora_model(
    model_name_or_path: str,
    lora_config: LoraConfig | None = None,
    return_tokenizer: bool = True,
    **settings: object,
) -> Any:
    """Load a language model in bfloat16 and add a LoRA adapter.

    Args:
        model_name_or_path: a folder or a hub name.
        lora_config: a ``peft.LoraConfig``; rank 64 on all linear layers when None.
        return_tokenizer: whether to return the tokenizer as well.
        settings: further keyword arguments of ``AutoModelForCausalLM.from_pretrained``.

    Returns:
        ``(model, tokenizer)``, or the model alone.
    """
    import torch
    from peft import get_peft_model

    settings.setdefault("dtype", torch.bfloat16)
    model = build_model(model_name_or_path, return_tokenizer=False, **settings)
    model.enable_input_require_grads()
    model = get_peft_model(model, lora_config or _default_lora())
    return (model, _tokenizer(model_name_or_path)) if return_tokenizer else model


def build_qlora_model(
    model_name_or_path: str,
    quantization_config: BitsAndBytesConfig | None = None,
    lora_config: LoraConfig | None = None,
    return_tokenizer: bool = True,
    **settings: object,
) -> Any:
    """Load a language model in 4 bits and add a LoRA adapter.

    Args:
        model_name_or_path: a folder or a hub name.
        quantization_config: a ``BitsAndBytesConfig``; NF4, doubly quantised, when None.
        lora_config: a ``peft.LoraConfig``; rank 64 on all linear layers when None.
        return_tokenizer: whether to return the tokenizer as well.
        settings: further keyword arguments of ``AutoModelForCausalLM.from_pretrained``.

    Returns:
        ``(model, tokenizer)``, or the model alone.

    Raises:
        UserError: when bitsandbytes is not installed.
    """
    import torch
    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    from xtuner.model.loading import enable_activation_checkpointing

    require("bitsandbytes", extra="quant", purpose="QLoRA")
    quantization_config = quantization_config or BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = build_model(
        model_name_or_path,
        return_tokenizer=False,
        quantization_config=quantization_config,
        **settings,
    )
    # peft would call activation checkpointing by the name that transformers removes in version 6
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model.enable_input_require_grads()
    enable_activation_checkpointing(model)
    model = get_peft_model(model, lora_config or _default_lora())
    return (model, _tokenizer(model_name_or_path)) if return_tokenizer else model


def _default_lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=64,
        lora_alpha=16,
        lora_dropout=0.1,
        bias="none",
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def _tokenizer(model_name_or_path: str) -> Any:
    from xtuner.model.transformers_models.auto import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        model_name_or_path, trust_remote_code=True, padding_side="right"
    )
