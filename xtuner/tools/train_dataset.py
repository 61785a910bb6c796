"""The training dataset of a config, for the commands that look at it or prepare it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from xtuner.config.values import raw_dict
from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from mmengine import Config


def train_dataset_of(cfg: Config, name: str) -> Mapping[str, Any]:
    """The settings of the dataset that a config trains on; imported names in them stay lazy.

    Lazy, so that what the dataset does not need (DeepSpeed, ...) need not be installed.

    Args:
        cfg: the loaded config.
        name: what to call it in messages.

    Raises:
        UserError: when the config has none.
    """
    dataset: Any = cfg._to_lazy_dict()
    path = train_dataset_path(cfg)
    for key in path:
        dataset = dataset.get(key) or {}
    if not dataset or not isinstance(dataset, Mapping):
        raise UserError(
            tr("the config has no training dataset"),
            hint=tr(
                "give it {key} = dict(type=process_hf_dataset, ...), as in "
                "'xtuner copy-cfg internlm2_chat_7b_qlora_custom_sft_e1 .'",
                key=".".join(path),
            ),
            where=Where(file=name, key=".".join(path)),
        )
    return dataset


def train_dataset_path(cfg: Config) -> tuple[str, ...]:
    """The keys of the settings of a config's training dataset."""
    if raw_dict(cfg).get("framework") == "huggingface":
        return ("train_dataset",)
    return ("train_dataloader", "dataset")


def build(settings: Mapping[str, Any]) -> Any:
    """Build what settings with lazy names in them describe."""
    from mmengine.config import ConfigDict

    from xtuner.registry import BUILDER

    return BUILDER.build(ConfigDict(settings))


def call_before_run(cfg: Config) -> None:
    """Call the config's own ``before_run`` functions, as the start of a training does."""
    for step in cfg._to_lazy_dict().get("before_run") or []:
        build(step)
