"""Configs with ``framework = 'huggingface'``: transformers' Trainer does the training.

Such a config sets ``training_args`` and ``trainer``, ``model`` (a Hugging Face model or the config
of one), and may set ``tokenizer``, ``train_dataset``, ``eval_dataset`` and ``lora``.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import nn

from xtuner.registry import BUILDER
from xtuner.utils.cpu import bound_known_products, keep_freed_memory
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr


def train(cfg: Config, *, resume: str | bool = False) -> int:
    """Build the trainer of a config, train, and save model and state.

    Args:
        cfg: the config; its ``work_dir`` is where everything goes.
        resume: a checkpoint folder of the Trainer, or True for the newest of the work dir.

    Returns:
        The exit status.
    """
    if not torch.cuda.is_available():
        bound_known_products()
        keep_freed_memory()
    trainer = build_trainer(cfg)
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    print(
        tr(
            "{trained:,} parameters are trained on {count:,} rows; everything goes to {output_dir}",
            trained=trained,
            count=len(trainer.train_dataset),
            output_dir=trainer.args.output_dir,
        )
    )
    trainer.train(resume_from_checkpoint=_checkpoint(resume, trainer.args.output_dir))
    trainer.save_state()
    trainer.save_model(output_dir=trainer.args.output_dir)
    print(tr("saved in {output_dir}", output_dir=trainer.args.output_dir))
    return 0


def build_trainer(cfg: Config) -> Any:
    """Build the model, the data and the Trainer of a config."""
    arguments = _training_arguments(cfg)
    with arguments.main_process_first(desc="data"):
        data = {
            name: _built(cfg[name])
            for name in ("train_dataset", "eval_dataset")
            if cfg.get(name) is not None
        }
    settings = dict(cfg.trainer) if isinstance(cfg.trainer, dict) else {"type": cfg.trainer}
    kind = settings.pop("type")
    if "data_collator" not in settings:
        from xtuner.dataset.collate_fns import default_collate_fn

        settings["data_collator"] = {"type": default_collate_fn, "return_hf_format": True}
    tokenizer = _built(cfg.get("tokenizer"))
    settings = {name: _collator(value) for name, value in settings.items()}
    accepted = inspect.signature(kind.__init__).parameters
    if tokenizer is not None and "processing_class" in accepted:
        settings.pop("tokenizer", None)
        settings.setdefault("processing_class", tokenizer)
    model = _model(cfg, checkpointing=arguments.gradient_checkpointing)
    return kind(model=model, args=arguments, **data, **settings)


def _training_arguments(cfg: Config) -> Any:
    """Build the TrainingArguments, in number formats that this machine has."""
    settings = dict(cfg.training_args)
    kind = settings.pop("type")
    settings["output_dir"] = cfg.work_dir
    if cfg.get("randomness", {}).get("seed") is not None:
        settings["seed"] = cfg.randomness.seed
    if not torch.cuda.is_available():
        if settings.get("fp16"):
            settings["fp16"], settings["bf16"] = False, True
            print(tr("training_args.fp16 does not run on this machine: bf16 is used."))
        settings.setdefault("use_cpu", True)
    settings.setdefault("report_to", "none")
    accepted = inspect.signature(kind.__init__).parameters
    gone = sorted(set(settings) - set(accepted))
    if gone:
        raise UserError(
            tr(
                "training_args: this version of transformers does not know {gone}.",
                gone=", ".join(gone),
            ),
            hint=tr("take these out of the config."),
        )
    return kind(**settings)


def _model(cfg: Config, *, checkpointing: bool) -> nn.Module:
    """Build the model: ready for quantised training, with an adapter where the config has one."""
    model = _built(cfg.model)
    model.config.use_cache = False
    if cfg.get("lora") is None:
        return model
    from peft import get_peft_model, prepare_model_for_kbit_training

    from xtuner.model.lora.targets import set_default_targets

    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if checkpointing:
        model.enable_input_require_grads()
    lora = _built(cfg.lora)
    set_default_targets(lora, model)
    return get_peft_model(model, lora)


def _built(value: object) -> Any:
    return BUILDER.build(value) if isinstance(value, dict) and "type" in value else value


def _collator(value: object) -> Any:
    """A ``data_collator=dict(type=function, ...)`` as the function with its keywords."""
    if not isinstance(value, dict) or "type" not in value:
        return value
    keywords = {name: item for name, item in value.items() if name != "type"}
    if inspect.isfunction(value["type"]):
        function = value["type"]
        return lambda rows: function(rows, **keywords)
    return value["type"](**keywords)


def _checkpoint(resume: str | bool, folder: str) -> str | None:
    if resume is True:
        from transformers.trainer_utils import get_last_checkpoint

        return get_last_checkpoint(folder) if Path(folder).is_dir() else None
    if resume and not Path(resume).is_dir():
        raise UserError(
            tr("there is no such checkpoint."),
            hint=tr("give a folder of the Trainer, checkpoint-N, or '--resume' alone."),
            where=Where(resume),
        )
    return resume or None
