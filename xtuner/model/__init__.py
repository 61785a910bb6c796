"""What is trained: supervised fine-tuning, preferences, reward models, images and text."""

from xtuner.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "sft": ("SupervisedFinetune",),
        "base": ("FinetuneModel",),
        "llava": ("LLaVAModel",),
        "internvl": ("InternVL_V1_5",),
    },
)
