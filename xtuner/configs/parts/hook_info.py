"""Shows a sample before training."""

from xtuner.engine.hooks import DatasetInfoHook

hook = dict(type=DatasetInfoHook, tokenizer=tokenizer, **INFO_FIELDS_HERE)
