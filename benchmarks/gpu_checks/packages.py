"""Put what a GPU machine without a network lacks into a zip file, for ``gpu_check.py --packages``.

    python benchmarks/gpu_checks/packages.py .gpu/packages.zip [--python 3.12] [--cuda 130]

The machine has torch, transformers and their dependencies, on Linux and x86-64. Of bitsandbytes
only the library for one version of CUDA is kept, which makes 9 MB of all. Needs pip and a network.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PINNED = ("mmengine", "addict", "termcolor", "yapf", "platformdirs", "datasets", "dill")
PINNED += ("multiprocess", "bitsandbytes", "prompt_toolkit", "wcwidth", "peft", "xxhash")
"""In the versions that are installed here."""
PEERS = ("trl==1.16.0", "liger-kernel==0.8.5")
GLIBC = ("2_28", "2_27", "2_24", "2_17")
"""Versions that wheels are built for."""


def download(folder: Path, python: str) -> None:
    """Download the wheels."""
    wanted = [f"{name}=={importlib.metadata.version(name)}" for name in PINNED]
    platforms = [f"manylinux_{version}_x86_64" for version in GLIBC] + ["manylinux2014_x86_64"]
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    words += ["--only-binary=:all:", "--python-version", python, "--dest", str(folder)]
    words += ["--implementation", "cp"]
    for platform in platforms:
        words += ["--platform", platform]
    subprocess.run([*words, *wanted, *PEERS], check=True)


def write(target: Path, wheels: list[Path], cuda: str) -> None:
    """Write the content of wheels into one zip file, without what is not needed."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as out:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as content:
                for name in content.namelist():
                    if _is_needed(name, cuda):
                        out.writestr(name, content.read(name))


def _is_needed(name: str, cuda: str) -> bool:
    if name.endswith("/") or "/tests/" in name:
        return False
    library = name.startswith("bitsandbytes/") and name.endswith(".so")
    return not library or f"cuda{cuda}" in name or "cpu" in name


def main() -> int:
    """Download and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("--python", default="3.12", help="version on the machine")
    parser.add_argument("--cuda", default="130", help="version that its torch is built for")
    args = parser.parse_args()
    args.target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        download(Path(name), args.python)
        write(args.target, sorted(Path(name).glob("*.whl")), args.cuda)
    print(f"{args.target}: {args.target.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
