"""XTuner 0.1.23 and LLaMA-Factory beside us: each in a virtual environment of its own.

    python benchmarks/peers.py xtuner-0.1.23 llama-factory [--shape llama_34m] [--methods full lora]

The environments are created once, in ``--home`` (by default in the user's cache), with this
environment's version of torch. A peer trains the same model on the same rows with the settings of
``measuring.py``, by its own code; tokens per second, peak memory and the mean loss are measured
alike. Where a peer cannot be installed or run, its result is the reason.

Writes ``results/peers_<shape>.json``; ``speed.py --peers`` alternates peers with the other sides.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import measuring

HERE = Path(__file__).parent
HOME = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "xtuner_peers"
FOR_CUDA = ("torchvision", "torchaudio")
MINUTES_TO_INSTALL, MINUTES_TO_RUN = 30, 30


@dataclass(frozen=True)
class Peer:
    """What pip installs, and the script in ``peer_drivers`` that trains with it.

    ``alone`` comes last, without what it asks for, of which ``packages`` has what is needed.
    """

    packages: str
    driver: str
    alone: str = ""


PEERS = {
    "xtuner-0.1.23": Peer(
        # transformers and peft of its time; it says Python < 3.11, and so pip would not have it
        "transformers==4.48.3 peft==0.14.0 mmengine==0.10.7 bitsandbytes==0.50.2 setuptools<81 "
        "datasets deepspeed einops openpyxl scikit-image scipy sentencepiece tiktoken",
        "xtuner_0_1_23.py",
        alone="xtuner==0.1.23",
    ),
    "llama-factory": Peer("llamafactory==0.9.5 bitsandbytes==0.50.2", "llama_factory.py"),
}


class Failed(Exception):
    """A peer that cannot be installed or run, with the reason."""


def python_of(name: str, home: Path) -> Path:
    """The Python of a peer's environment, which is made if it is not there yet.

    Raises:
        Failed: when it cannot be made.
    """
    folder, peer = home / name, PEERS[name]
    python, done = folder / "bin" / "python", folder / "installed"
    if done.exists():
        return python
    _run([sys.executable, "-m", "venv", "--clear", str(folder)], MINUTES_TO_INSTALL)
    torch = f"torch=={version('torch').partition('+')[0]}"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-compile"]
    _run([*pip, torch, *peer.packages.split()], MINUTES_TO_INSTALL)
    if peer.alone:
        _run([*pip, "--no-deps", "--ignore-requires-python", peer.alone], MINUTES_TO_INSTALL)
    if "+cpu" in version("torch"):  # with which PyPI's builds of these cannot be imported
        words = [str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *FOR_CUDA]
        _run(words, MINUTES_TO_INSTALL)
    done.touch()
    return python


def run(
    name: str, folder: Path, shape: measuring.Shape, case: measuring.Case, home: Path = HOME
) -> dict[str, Any]:
    """Train with a peer in ``folder``, which ``measuring.prepare`` has filled.

    Returns:
        As ``Clock.facts``; ``{"failed": reason}`` where it cannot be.
    """
    try:
        python = python_of(name, home)
        write_packs(folder, shape)
        numbers = (shape.max_length, shape.packs_a_step, shape.warm_steps, shape.steps)
        words = [str(python), str(HERE / "peer_drivers" / PEERS[name].driver), str(folder)]
        words += [case.method, case.recipe, case.dtype, *map(str, numbers)]
        environment = {"PYTHONPATH": str(HERE), "HF_HUB_OFFLINE": "1"}
        found: dict[str, Any] = json.loads(
            _run(words, MINUTES_TO_RUN, environment).splitlines()[-1]
        )
    except Failed as reason:
        return {"failed": str(reason)}
    return found


def write_packs(folder: Path, shape: measuring.Shape) -> None:
    """The packed rows as JSON, for a peer that reads no other."""
    file = folder / "packs.json"
    if not file.exists():
        keys = ("input_ids", "labels", "cumulative_len")
        rows = [{key: row[key] for key in keys} for row in measuring.packs(folder, shape)]
        file.write_text(json.dumps(rows), "utf-8")


def _run(words: list[str], minutes: float, environment: dict[str, str] | None = None) -> str:
    """The output of a command.

    Raises:
        Failed: with the last line it wrote that says what went wrong.
    """
    what = " ".join([Path(words[0]).name, *words[1:3]])
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    try:
        done = subprocess.run(
            words,
            env=inherited | (environment or {}),
            capture_output=True,
            text=True,
            timeout=minutes * 60,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"{what}: not done after {minutes:g} minutes") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line or line.startswith("ERROR")]
        last = (errors or lines or [f"status {done.returncode}"])[-1]
        raise Failed(f"{what}: {last.strip()}")
    return done.stdout


def main() -> int:
    """Run the peers and write what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("peers", nargs="+", choices=PEERS)
    parser.add_argument("--shape", choices=measuring.SHAPES, default="llama_34m")
    parser.add_argument("--methods", nargs="+", choices=measuring.METHODS, default=["full", "lora"])
    parser.add_argument("--home", type=Path, default=HOME)
    parser.add_argument("--results", type=Path, default=measuring.RESULTS)
    args = parser.parse_args()
    shape = measuring.SHAPES[args.shape]
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measuring.prepare(folder, shape)
        for method in args.methods:
            case = measuring.Case(method)
            found = {peer: run(peer, folder, shape, case, args.home) for peer in args.peers}
            rate = {"bf16_matmul_tflops": measuring.matmul_rate()}
            result[method] = measuring.circumstances() | rate | found
            print(method, json.dumps(found), flush=True)
    text = json.dumps(result, indent=1) + "\n"
    (args.results / f"peers_{args.shape}.json").write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
