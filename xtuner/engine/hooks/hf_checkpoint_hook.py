"""Export in Hugging Face layout while training, so that no conversion is needed afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from xtuner.export import sidecar_files, trained_template
from xtuner.export.untrained import complete_from_base
from xtuner.parallel.unwrap import unwrap_model
from xtuner.utils.errors import UserError, Where
from xtuner.utils.files import written_aside
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from xtuner.engine.runner.finetune_runner import FinetuneRunner


@HOOKS.register_module()
class HFCheckpointHook(Hook):
    """Writes the model, or its adapter, as a Hugging Face folder that is ready to be used.

    Beside the weights lie, as ``xtuner convert pth_to_hf`` writes them, the config's tokenizer with
    the prompt template of the training, its stop tokens, and the fingerprint of an adapter's base.

    Args:
        out_dir: the folder; ``<work_dir>/hf_model`` when None.
        every_save: also at each checkpoint, into ``<out_dir>_iter_N``.
    """

    priority = 95  # after CheckpointHook
    essential = True  # an export that fails ends the run: nobody may believe it is there

    def __init__(self, out_dir: str | None = None, every_save: bool = False) -> None:
        self.out_dir = out_dir
        self.every_save = every_save

    def before_train(self, runner: FinetuneRunner) -> None:
        """Refuse, before anything takes long, what could not be exported at the end."""
        trained_template.template_of(runner.cfg)
        folder = self._folder(runner)
        exports = ("config.json", "adapter_config.json")
        occupied = folder.is_dir() and any(folder.iterdir())
        if occupied and not any((folder / name).exists() for name in exports):
            raise UserError(
                tr("HFCheckpointHook would replace this folder, which holds something else."),
                hint=tr("choose a new folder as its out_dir."),
                where=Where(str(folder), key="out_dir"),
            )

    def before_save_checkpoint(self, runner: FinetuneRunner, checkpoint: dict[str, Any]) -> None:
        """Export beside a checkpoint, where asked."""
        if self.every_save:
            folder = self._folder(runner)
            self._export(
                runner, folder.with_name(f"{folder.name}_iter_{checkpoint['meta']['iter']}")
            )

    def after_run(self, runner: FinetuneRunner) -> None:
        """Export at the end of the training."""
        self._export(runner, self._folder(runner))

    def _folder(self, runner: FinetuneRunner) -> Path:
        return Path(self.out_dir or Path(runner.work_dir) / "hf_model")

    def _export(self, runner: FinetuneRunner, folder: Path) -> None:
        with runner.strategy.full_params(runner.model):
            if not is_main_process():
                return
            with written_aside(folder) as aside:
                model: Any = unwrap_model(runner.model)
                model.to_hf(str(aside))
                complete_from_base(aside, getattr(model, "llm", None))
                self._write_beside(runner.cfg, aside)
                if (aside / "adapter_config.json").is_file():
                    base_name = model.llm.get_base_model().name_or_path
                    sidecar_files.write_base_fingerprint(aside, base_name)
            runner.logger.info(tr("exported in Hugging Face layout: {folder}", folder=folder))

    def _write_beside(self, config: Any, aside: Path) -> None:
        processor = trained_template.processor_of(config)
        if processor is not None:
            sidecar_files.write_processor(aside, processor)
        tokenizer = trained_template.tokenizer_of(config)
        if tokenizer is not None:
            sidecar_files.write_tokenizer(aside, tokenizer, trained_template.template_of(config))
        reward_token = trained_template.reward_token_of(config)
        if reward_token is not None:
            sidecar_files.write_reward_token(aside, reward_token)
