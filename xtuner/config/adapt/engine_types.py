"""Classes that adapting puts into a config, by name: nothing of ``xtuner.engine`` is imported."""

from mmengine.config.lazy import LazyObject

HOOKS = {
    name: LazyObject("xtuner.engine.hooks", name)
    for name in (
        *("DatasetInfoHook", "EvaluateChatHook", "HFCheckpointHook", "ThroughputHook"),
        "VarlenAttnArgsToMessageHubHook",
    )
}
"""Hooks that a config may give by name, which are registered when they are imported."""
OPTIM_WRAPPER = LazyObject("xtuner.engine.optim", "FinetuneOptimWrapper")
CHECKPOINT_HOOK = LazyObject("xtuner.engine.hooks.checkpoint_hook", "CheckpointHook")
EARLY_STOPPING_HOOK = LazyObject("xtuner.engine.hooks.early_stopping_hook", "EarlyStoppingHook")
LOOPS = {
    "train_cfg": LazyObject("xtuner.engine.runner.loops", "TrainLoop"),
    "val_cfg": LazyObject("xtuner.engine.runner.val_loop", "ValLoop"),
    "test_cfg": LazyObject("xtuner.engine.runner.val_loop", "TestLoop"),
}
DEEPSPEED_STRATEGY = LazyObject("xtuner.engine._strategy.deepspeed", "DeepSpeedStrategy")
FSDP_STRATEGY = LazyObject("xtuner.engine._strategy.fsdp", "FSDPStrategy")
DEFAULT_SAMPLER = LazyObject("mmengine.dataset", "DefaultSampler")
SEQUENCE_PARALLEL_SAMPLER = LazyObject("xtuner.parallel.sequence", "SequenceParallelSampler")
