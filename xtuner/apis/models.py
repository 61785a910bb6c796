"""Language models for full, LoRA and QLoRA training, and their tokenizers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xtuner.utils.errors import require

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig


def build_model(
    model_name_or_path: str,
    return_tokenizer: bool = True,
    *,
    trust_remote_code: bool = False,
    **settings: object,
) -> Any:
    """Load a language model for full training.

    Args:
        model_name_or_path: a folder or a hub name.
        return_tokenizer: whether to return the tokenizer as well.
        trust_remote_code: whether code of the folder may run, where no class is known here.
        settings: further keyword arguments of ``AutoModelForCausalLM.from_pretrained``.

    Returns:
        ``(model, tokenizer)``, or the model alone.
    """
    from xtuner.model.remote_code import IN_CONFIG, load_pretrained
    from xtuner.model.transformers_models.auto import AutoModelForCausalLM

    model: Any = load_pretrained(
        AutoModelForCausalLM,
        model_name_or_path,
        trusted=trust_remote_code,
        consent=IN_CONFIG,
        **settings,
    )
    model.config.use_cache = False
    if not return_tokenizer:
        return model
    return model, _tokenizer(model_name_or_path, trust_remote_code)


def build_lora_model(
    model_name_or_path: str,
    lora_config: LoraConfig | None = None,
    return_tokenizer: bool = True,
    *,
    trust_remote_code: bool = False,
    **settings: object,
) -> Any:
    """Load a language model in bfloat16 and add a LoRA adapter.

    Args:
        model_name_or_path: a folder or a hub name.
        lora_config: a ``peft.LoraConfig``; rank 64 on all linear layers when None.
        return_tokenizer: whether to return the tokenizer as well.
        trust_remote_code: whether code of the folder may run, where no class is known here.
        settings: further keyword arguments of ``AutoModelForCausalLM.from_pretrained``.

    Returns:
        ``(model, tokenizer)``, or the model alone.
    """
    import torch
    from peft import get_peft_model

    settings.setdefault("dtype", torch.bfloat16)
    model = build_model(model_name_or_path, False, trust_remote_code=trust_remote_code, **settings)
    model.enable_input_require_grads()
    model = get_peft_model(model, lora_config or _default_lora())
    if not return_tokenizer:
        return model
    return model, _tokenizer(model_name_or_path, trust_remote_code)


def build_qlora_model(
    model_name_or_path: str,
    quantization_config: BitsAndBytesConfig | None = None,
    lora_config: LoraConfig | None = None,
    return_tokenizer: bool = True,
    *,
    trust_remote_code: bool = False,
    **settings: object,
) -> Any:
    """Load a language model in 4 bits and add a LoRA adapter.

    Args:
        model_name_or_path: a folder or a hub name.
        quantization_config: a ``BitsAndBytesConfig``; NF4, doubly quantised, when None.
        lora_config: a ``peft.LoraConfig``; rank 64 on all linear layers when None.
        return_tokenizer: whether to return the tokenizer as well.
        trust_remote_code: whether code of the folder may run, where no class is known here.
        settings: further keyword arguments of ``AutoModelForCausalLM.from_pretrained``.

    Returns:
        ``(model, tokenizer)``, or the model alone.

    Raises:
        UserError: when bitsandbytes is not installed.
    """
    import torch
    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    from xtuner.model.activation_checkpointing import enable_activation_checkpointing

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
        trust_remote_code=trust_remote_code,
        quantization_config=quantization_config,
        **settings,
    )
    # peft would call activation checkpointing by the name that transformers removes in version 6
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model.enable_input_require_grads()
    enable_activation_checkpointing(model)
    model = get_peft_model(model, lora_config or _default_lora())
    if not return_tokenizer:
        return model
    return model, _tokenizer(model_name_or_path, trust_remote_code)


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


def _tokenizer(model_name_or_path: str, trusted: bool) -> Any:
    from xtuner.model.remote_code import IN_CONFIG, load_pretrained
    from xtuner.model.transformers_models.auto import AutoTokenizer

    return load_pretrained(
        AutoTokenizer,
        model_name_or_path,
        trusted=trusted,
        consent=IN_CONFIG,
        padding_side="right",
    )
