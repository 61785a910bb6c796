"""What commands import, for the process that ``tests.helpers.forked`` forks them from."""

import gc
import importlib

from xtuner.engine.startup import import_runner

import_runner(None)
for name in (
    "datasets",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "peft",
    "transformers.models.llama.modeling_llama",
    "xtuner.engine.runner.finetune_runner",
    "xtuner.engine.train",
    "xtuner.entry_point",
    "xtuner.model.sft",
):
    importlib.import_module(name)
gc.freeze()  # collections in forked processes do not copy the memory of what is imported
