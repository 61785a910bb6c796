"""The training dataset of a config, for the commands that look at it or prepare it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

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
    plain = cfg._to_lazy_dict()
    if plain.get("framework", "mmengine") == "huggingface":
        key, dataset = "train_dataset", plain.get("train_dataset")
    else:
        loader = plain.get("train_dataloader") or {}
        key, dataset = "train_dataloader.dataset", loader.get("dataset")
    if not isinstance(dataset, Mapping):
        raise UserError(
            tr("the config has no training dataset"),
            hint=tr(
                "give it {key} = dict(type=process_hf_dataset, ...), as in "
                "'xtuner copy-cfg internlm2_chat_7b_qlora_custom_sft_e1 .'",
                key=key,
            ),
            where=Where(file=name, key=key),
        )
    return dataset


def build(settings: Mapping[str, Any]) -> Any:
    """Build what settings with lazy names in them describe."""
    from mmengine.config import ConfigDict

    from xtuner.registry import BUILDER

    return BUILDER.build(ConfigDict(settings))


def call_before_run(cfg: Config) -> None:
    """Call the config's own ``before_run`` functions, as the start of a training does."""
    for step in cfg._to_lazy_dict().get("before_run") or []:
        build(step)
