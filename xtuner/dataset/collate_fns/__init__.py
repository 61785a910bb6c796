"""Functions that make a batch of the rows of a dataset."""

# Not lazily: each function has the name of its module, which would take its place.
from xtuner.dataset.collate_fns.default_collate_fn import default_collate_fn
from xtuner.dataset.collate_fns.mmlu_collate_fn import mmlu_collate_fn
from xtuner.dataset.collate_fns.preference_collate_fn import preference_collate_fn
from xtuner.dataset.collate_fns.vision_language_collate_fn import vision_language_collate_fn

__all__ = [
    "default_collate_fn",
    "mmlu_collate_fn",
    "preference_collate_fn",
    "vision_language_collate_fn",
]
