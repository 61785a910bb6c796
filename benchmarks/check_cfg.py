"""How long list-cfg takes, check-cfg of one file, and checking every name of the catalogue.

    python benchmarks/check_cfg.py

The bounds that the project holds itself to, on two cores: 0.3 s, 2 s, 60 s. Writes
``results/check_cfg.json``.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

from xtuner import configs

RESULT = Path(__file__).parent / "results" / "check_cfg.json"

REPEATS = 5
ONE = "internlm2_chat_7b_qlora_alpaca_e3"


def command_seconds(*words: str) -> float:
    """The median wall time of a whole command, interpreter start included."""
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "xtuner", *words], capture_output=True)
        times.append(time.perf_counter() - begin)
        assert done.returncode in (0, 1), done.stderr.decode()
    return statistics.median(times)


def all_names_seconds() -> float:
    """The time to check all names in one process."""
    from xtuner.config.check import check

    begin = time.perf_counter()
    for name in configs.names():
        check(name)
    return time.perf_counter() - begin


def main() -> None:
    rows = [
        ("list-cfg", command_seconds("list-cfg"), 0.3),
        ("check-cfg, one file", command_seconds("check-cfg", ONE), 2.0),
        (f"check, all {len(configs.names())} names", all_names_seconds(), 60.0),
    ]
    for what, seconds, bound in rows:
        print(f"{what:<28} {seconds:7.2f} s   (bound {bound:g} s)")
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores, {platform.python_version()}",
        "seconds": {what: {"median": round(s, 3), "bound": bound} for what, s, bound in rows},
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
