"""What is trained, and how it is loaded."""

from xtuner.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "sft": ("SupervisedFinetune",),
        "base": ("FinetuneModel",),
        "dpo": ("DPO",),
        "orpo": ("ORPO",),
        "reward": ("RewardModel",),
        "image_text": ("VisionLanguageFinetune",),
        "image_text_preference": (
            "VisionLanguageDPO",
            "VisionLanguageORPO",
            "VisionLanguageRewardModel",
        ),
        "llava": ("LLaVAModel",),
        "internvl": ("InternVL_V1_5",),
    },
)
