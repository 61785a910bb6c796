"""What commands import, for the process that ``tests.helpers.forked`` forks them from."""

import importlib

from xtuner.engine.startup import import_runner

import_runner(None)
for name in (
    "datasets",
    "peft",
    "transformers.models.llama.modeling_llama",
    "xtuner.engine.runner.finetune_runner",
    "xtuner.engine.train",
    "xtuner.model.sft",
):
    importlib.import_module(name)
