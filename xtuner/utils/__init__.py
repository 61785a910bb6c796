"""Leaves that import nothing else of ours: templates, constants, errors, files, languages."""

from xtuner.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "constants": (
            "IGNORE_INDEX",
            "DEFAULT_PAD_TOKEN_INDEX",
            "IMAGE_TOKEN_INDEX",
            "DEFAULT_IMAGE_TOKEN",
        ),
        "templates": ("PROMPT_TEMPLATE", "SYSTEM_TEMPLATE"),
        "errors": ("UserError",),
        "stop_criteria": ("StopWordStoppingCriteria",),
        "moe_state_dict": (
            "SUPPORT_MODELS",
            "get_origin_state_dict",
            "load_state_dict_into_model",
        ),
    },
)
