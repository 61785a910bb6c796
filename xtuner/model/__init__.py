"""What is trained: a language model in supervised fine-tuning, with preferences, with pictures."""

from xtuner.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "sft": ("SupervisedFinetune",),
        "llava": ("LLaVAModel",),
        "internvl": ("InternVL_V1_5",),
    },
)
