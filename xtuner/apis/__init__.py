"""XTuner's models and datasets from Python, for use with transformers' ``Trainer``.

``build_model``, ``build_lora_model``, ``build_qlora_model``; for each dataset ``<name>_dataset``
and ``<name>_data_collator``; ``DefaultTrainingArguments``.
"""

from xtuner.utils.lazy import lazy_exports

DATASETS = (
    "alpaca",
    "alpaca_enzh",
    "alpaca_zh",
    "arxiv",
    "code_alpaca",
    "colorist",
    "lawyer",
    "lawyer_crime",
    "lawyer_reference",
    "medical",
    "moss_003_sft",
    "moss_003_sft_no_plugins",
    "moss_003_sft_plugins",
    "oasst1",
    "openorca",
    "sql",
    "tiny_codes",
    "wizardlm",
)
"""The datasets that have a ``<name>_dataset`` and a ``<name>_data_collator``."""

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "models": ("build_model", "build_lora_model", "build_qlora_model"),
        "datasets": tuple(f"{name}_dataset" for name in DATASETS),
        "collators": tuple(f"{name}_data_collator" for name in DATASETS),
        "training_args": ("DefaultTrainingArguments",),
    },
)
