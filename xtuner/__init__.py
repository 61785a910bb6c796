"""XTuner: fine-tune large language models by editing one Python file.

Importing this package is cheap on purpose: the command line must answer before torch could load.
"""

from xtuner.version import __version__, version_info

__all__ = ["__version__", "cli", "version_info"]


def cli() -> None:
    """Run the ``xtuner`` command and exit with its status (the console script's entry)."""
    import os

    from xtuner.entry_point import main

    if not {"RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"} & os.environ.keys():
        raise SystemExit(main())
    from xtuner.utils.process_exit import exit_with

    exit_with(main)
