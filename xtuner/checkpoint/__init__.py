"""The state of a run on disk: checkpoints, their manifests, and resuming from them."""

from xtuner.utils.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {"checkpoint": ("save_checkpoint", "load_checkpoint", "load_state_dict", "find_latest")},
)
