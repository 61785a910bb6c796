"""torchrun as this command wants it: the exit status of the process that failed first is ours.

Started as ``python -m xtuner.engine.torchrun`` with torchrun's own words. torchrun itself turns
every failure into status 1 and prints a table of tracebacks; here the message of the process that
failed stays the last word.
"""

from __future__ import annotations

import sys


def main(words: list[str]) -> int:
    """Run the processes of this machine.

    Args:
        words: of torchrun.

    Returns:
        0; or the status of the process that failed first, 128 + N when signal N ended it.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(words))
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        return int(first.exitcode if first.exitcode >= 0 else 128 - first.exitcode)
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
