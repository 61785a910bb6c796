"""How fast the catalogue answers: `xtuner list-cfg` beside an empty Python; rendering all names.

python benchmarks/catalogue.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from xtuner.configs import names, render

RUNS = 10
LIMIT = 0.3  # seconds that list-cfg may take


def seconds(command: list[str]) -> float:
    """The median wall time of a command, over ``RUNS`` runs after one that warms up."""
    times = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> int:
    """Measure and print.

    Returns:
        0, or 1 when list-cfg takes longer than it may.
    """
    empty = seconds([sys.executable, "-c", "pass"])
    listing = seconds([sys.executable, "-m", "xtuner", "list-cfg"])
    long = seconds([sys.executable, "-m", "xtuner", "list-cfg", "--long"])
    start = time.perf_counter()
    for name in names():
        render(name)
    rendering = time.perf_counter() - start
    print(f"python -c pass          {empty * 1000:6.0f} ms")
    print(f"xtuner list-cfg         {listing * 1000:6.0f} ms (at most {LIMIT * 1000:.0f})")
    print(f"xtuner list-cfg --long  {long * 1000:6.0f} ms")
    print(f"rendering {len(names())} configs  {rendering * 1000:6.0f} ms")
    return 0 if listing < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
