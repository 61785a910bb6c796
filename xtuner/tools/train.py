"""``xtuner train``: fine-tune as a config says."""

from __future__ import annotations

import argparse
import os

from xtuner.tools.arguments import add_config_options, add_launcher
from xtuner.utils.lang import tr


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("config", help=tr("name or path of a config"))
    parser.add_argument(
        "--work-dir",
        help=tr("where logs and checkpoints go (default: work_dirs/<config name>)"),
    )
    parser.add_argument(
        "--deepspeed",
        help=tr("a DeepSpeed config: a path or deepspeed_zero1|2|2_offload|3|3_offload"),
    )
    parser.add_argument(
        "--fsdp",
        action="store_true",
        help=tr("shard the model over the processes (FSDP)"),
    )
    parser.add_argument(
        "--fsdp-offload",
        action="store_true",
        help=tr("the same, with the shards in main memory"),
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="CHECKPOINT",
        help=tr(
            "resume from a checkpoint; without a path, from the newest usable one in the work dir"
        ),
    )
    parser.add_argument(
        "--resume-allow",
        metavar="KINDS",
        default="",
        help=tr(
            "what may have changed since, separated by commas: "
            "config,data,tokenizer,packages,world_size,all "
            "(restart: start over where no checkpoint is usable)"
        ),
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help=tr("replace the checkpoints of an earlier run in the work dir"),
    )
    parser.add_argument("--seed", type=int, help=tr("random seed"))
    parser.add_argument("--gpu-id", type=int, help=tr("the GPU to use, with one process"))
    add_shared_arguments(parser)


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what ``train`` and ``test`` have in common."""
    add_config_options(parser)
    add_launcher(parser)
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Train; with several processes asked for by the environment, through torchrun."""
    from xtuner.engine.signals import handled

    with handled():
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    from xtuner.engine.launch import start_processes

    start_processes(args.launcher, ["train", *args.argv])
    if args.gpu_id is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(args.gpu_id)
    if args.launcher != "none":
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    from xtuner.engine.train import train

    return train(
        args.config,
        work_dir=args.work_dir,
        deepspeed=args.deepspeed,
        fsdp=args.fsdp,
        fsdp_offload=args.fsdp_offload,
        resume=args.resume,
        resume_allow=[word for word in args.resume_allow.split(",") if word],
        seed=args.seed,
        overwrite=args.overwrite,
        options=args.cfg_options,
        launcher=args.launcher,
    )
