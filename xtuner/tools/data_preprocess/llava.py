"""``xtuner preprocess llava``: tokenize an image config's texts before training.

The images are read in training as before; the config that is written reads the texts from the
folder through ``offline_processed_text_folder``.
"""

from __future__ import annotations

import argparse

from xtuner.tools.data_preprocess import sft
from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr

add_arguments = sft.add_arguments


def run(args: argparse.Namespace) -> int:
    """Build the dataset, save its texts.

    Returns:
        0.
    """
    from xtuner.config import load_config
    from xtuner.tools.data_preprocess import prepared
    from xtuner.tools.train_dataset import build, call_before_run, train_dataset_of

    folder = sft.out_folder(args)
    cfg = load_config(args.config, args.cfg_options)
    settings = dict(train_dataset_of(cfg, args.config))
    if "image_folder" not in settings:
        raise UserError(
            tr("the dataset of this config has no image_folder"),
            hint=tr("'xtuner preprocess sft' prepares text datasets."),
        )
    call_before_run(cfg)
    dataset = build(settings)
    prepared.save(dataset.text_data, folder)
    offline = prepared.from_disk(folder)["dataset_path"]
    changed = {**settings, "data_path": None, "offline_processed_text_folder": offline}
    config = prepared.write_config(cfg, changed, folder)
    prepared.say_where(len(dataset), config)
    return 0
