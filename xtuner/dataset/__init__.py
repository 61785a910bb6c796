"""Rows → turns → token ids and labels → packs → batches."""

from xtuner.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "huggingface": ("process_hf_dataset",),
        "modelscope": ("process_ms_dataset",),
        "concat": ("ConcatDataset",),
        "moss": ("MOSSSFTDataset",),
        "json_file": ("load_json_file",),
        "llava": ("LLaVADataset",),
        "vision_language.dataset": ("VisionLanguageDataset",),
        "vision_language.preference": ("VisionLanguagePreferenceDataset",),
        "internvl": ("InternVL_V1_5_Dataset",),
        "refcoco_json": (
            "InvRefCOCOJsonDataset",
            "RefCOCOJsonDataset",
            "RefCOCOJsonEvalDataset",
        ),
        "images": ("decode_base64_to_image", "expand2square", "load_image"),
    },
)
