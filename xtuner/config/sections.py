"""The top-level sections of a config that a run reads, and the keys of those without a ``type``."""

from __future__ import annotations

from collections.abc import Mapping

ANY: frozenset[str] | None = None

# None: the keys are not limited here (they belong to a type, or are free names).
SECTIONS: Mapping[str, frozenset[str] | None] = {
    "model": ANY,
    "tokenizer": ANY,
    "work_dir": ANY,
    "before_run": ANY,
    "train_dataloader": ANY,
    "val_dataloader": ANY,
    "test_dataloader": ANY,
    "train_cfg": ANY,
    "val_cfg": ANY,
    "test_cfg": ANY,
    "val_evaluator": ANY,
    "test_evaluator": ANY,
    "auto_scale_lr": frozenset({"base_batch_size", "enable"}),
    "optim_wrapper": ANY,
    "param_scheduler": ANY,
    "default_hooks": ANY,
    "custom_hooks": ANY,
    "data_preprocessor": ANY,
    "load_from": ANY,
    "resume": ANY,
    "launcher": ANY,
    "env_cfg": frozenset({"cudnn_benchmark", "mp_cfg", "dist_cfg", "resource_limit"}),
    "log_processor": frozenset(
        {"type", "window_size", "by_epoch", "custom_cfg", "num_digits", "log_with_hierarchy"}
        | {"mean_pattern"}
    ),
    "log_level": ANY,
    "visualizer": ANY,
    "default_scope": ANY,
    "randomness": frozenset({"seed", "diff_rank_seed", "deterministic"}),
    "experiment_name": ANY,
    "strategy": ANY,
    "runner_type": ANY,
    "compile": ANY,
    "custom_imports": frozenset({"imports", "allow_failed_imports"}),
    "framework": ANY,
    "trainer": ANY,
    "training_args": ANY,
    "lora": ANY,
    "train_dataset": ANY,
    "max_length": ANY,
    "sequence_parallel_size": ANY,
    "val_size": ANY,
    "find_unused_parameters": ANY,
}

DATALOADER_KEYS = frozenset(
    {"batch_size", "num_workers", "dataset", "sampler", "batch_sampler", "collate_fn"}
    | {"pin_memory", "drop_last", "timeout", "worker_init_fn", "multiprocessing_context"}
    | {"prefetch_factor", "persistent_workers", "pin_memory_device", "ordered_map"}
    | {"num_batch_per_epoch", "type", "shuffle"}
)

CLIP_GRAD_KEYS = frozenset(
    {"max_norm", "norm_type", "error_if_nonfinite", "foreach", "type", "clip_value"}
)


def known_keys(path: tuple[str, ...]) -> frozenset[str] | None:
    """The keys a dict without ``type`` may hold at this place; None when they are not limited."""
    if len(path) == 1 and path[0].endswith("_dataloader"):
        return DATALOADER_KEYS
    if path == ("optim_wrapper", "clip_grad"):
        return CLIP_GRAD_KEYS
    return SECTIONS.get(path[0]) if len(path) == 1 else None
