"""Ten steps on two processes, however the model is distributed over them, equal those on one.

Runs are made when a test first needs them, those of one way by the same ranks; the tests share
them.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from tests.equivalence.runs import train_on_ranks
from tests.helpers.forked import LIMIT, run
from tests.helpers.tiers import few_fast
from tests.helpers.tiny import save_tiny
from xtuner.checkpoint.checkpoint import load_state_dict
from xtuner.entry_point import main

CONFIG = Path(__file__).parent / "scale_config.py"
BOUND = 5e-7  # of weights around 0.02 in float32 that were each moved by up to 0.01
KINDS = {
    "full": [],
    "lora": ["adapter=True"],
    "qlora": ["adapter=True", "bits=True"],
    "saved": ["adapter=True", "saved=True"],  # a whole layer beside adapters
}
WAYS = {
    "ddp": [],
    "fsdp": ["--fsdp"],
    "fsdp_offload": ["--fsdp-offload"],
    "zero1": ["--deepspeed", "deepspeed_zero1"],
    "zero2": ["--deepspeed", "deepspeed_zero2"],
    "zero2_offload": ["--deepspeed", "deepspeed_zero2_offload"],
    "zero3": ["--deepspeed", "deepspeed_zero3"],
    "zero3_offload": ["--deepspeed", "deepspeed_zero3_offload"],
}
RUNS = [
    *(("full", way) for way in WAYS),
    *(("lora", way) for way in ("fsdp", "zero1", "zero2_offload", "zero3")),
    *(("qlora", way) for way in ("ddp", "fsdp", "zero2", "zero3")),
    *(("saved", way) for way in ("fsdp", "zero3")),
]
EXPORTED = [("full", "fsdp"), ("full", "zero3"), ("lora", "fsdp"), ("lora", "zero3")]
RESUMED = [("full", "fsdp"), ("lora", "fsdp"), ("full", "zero1"), ("full", "zero2")]
RESUMED += [("full", "zero3"), ("lora", "zero3")]
# Made together, by the same ranks: a start costs more than a run. The last are slow.
TOGETHER = [
    ("ddp", "fsdp"),
    ("zero3",),
    ("fsdp_offload", "zero1", "zero2", "zero2_offload", "zero3_offload"),
]
FAST = [run for run in RUNS if run[1] not in TOGETHER[-1]]
pytestmark = pytest.mark.timeout(3 * LIMIT)  # of a test that makes runs


class Runs:
    """Where each run's output lies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def words(self, name: str, kind: str, way: str, processes: int, *more: str) -> list[str]:
        options = [f"base={str(self.folder / 'base')!r}", *KINDS[kind]]
        options.append(f"accumulative_counts={4 // processes}")
        if (kind, way) in EXPORTED and not more:
            options.append("hooks=True")
        out = str(self.folder / name)
        return [str(CONFIG), "--work-dir", out, *WAYS[way], *more, "--cfg-options", *options]

    def start(self, processes: int, runs: list[list[str]], name: str) -> None:
        folder = self.folder / f"ranks_{name}"
        folder.mkdir(exist_ok=True)
        train_on_ranks(processes, runs, folder, self.folder)

    def need(self, *names: str) -> None:
        """Make runs, and what is made together with them, unless that is done already.

        The lock is for the workers of pytest-xdist.
        """
        for name in names:
            make = getattr(self, f"_make_{name}", None)
            with FileLock(self.folder / f"{name}.lock"):
                done = self.folder / f"{name}.done"
                if done.exists():
                    continue
                make() if make is not None else self._make_together(name)
                done.touch()

    def need_way(self, way: str, *, resumed: bool = False) -> None:
        """Make the runs of a way to distribute a model, and those on one process."""
        first = next(ways[0] for ways in TOGETHER if way in ways)
        self.need("base", "one", first, *([f"{first}_resumed"] if resumed else []))

    def _make_base(self) -> None:
        save_tiny(self.folder / "base")

    def _make_one(self) -> None:
        self.start(1, [self.words(f"{kind}_one", kind, "ddp", 1) for kind in KINDS], "one")

    def _make_together(self, name: str) -> None:
        """All runs of some ways; or those resumed from their middle, with one more of FSDP."""
        ways = next(ways for ways in TOGETHER if ways[0] == name.removesuffix("_resumed"))
        if not name.endswith("_resumed"):
            runs = [run for run in RUNS if run[1] in ways]
            self.start(2, [self.words(f"{k}_{w}", k, w, 2) for k, w in runs], name)
            return
        again = [run for run in RESUMED if run[1] in ways]
        for kind, way in again:
            self.begin_again(f"{kind}_{way}", f"{kind}_{way}_resumed")
        words = [self.words(f"{k}_{w}_resumed", k, w, 2, "--resume") for k, w in again]
        self.start(2, words, name)

    def _make_fsdp_alone(self) -> None:
        self.begin_again("full_fsdp", "full_fsdp_alone")
        more = ("--resume", "--resume-allow", "config,world_size")
        self.start(1, [self.words("full_fsdp_alone", "full", "fsdp", 1, *more)], "fsdp_alone")

    def begin_again(self, name: str, copy: str) -> None:
        """A copy of a run as it was after half of its steps."""
        (self.folder / copy).mkdir()
        for part in (self.folder / name).glob("iter_10.pth*"):
            (shutil.copytree if part.is_dir() else shutil.copy)(
                part, self.folder / copy / part.name
            )

    def weights(self, name: str, iteration: int = 20):
        return load_state_dict(self.folder / name / f"iter_{iteration}.pth")

    def losses(self, name: str) -> list[float]:
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, testrun_uid):
    """The runs, shared by the workers of pytest-xdist."""
    shared = tmp_path_factory.getbasetemp().parent / f"scale_{testrun_uid}"
    shared.mkdir(exist_ok=True)
    return Runs(shared)


def largest(one, other):
    assert one.keys() == other.keys()
    return max(float((one[key].float() - other[key].float()).abs().max()) for key in one)


@pytest.mark.parametrize(("kind", "way"), few_fast(RUNS, FAST))
def test_two_processes_equal_one(runs, kind, way):
    runs.need_way(way)
    name = f"{kind}_{way}"
    for iteration in (10, 20):
        one = runs.weights(f"{kind}_one", 2 * iteration)
        assert largest(one, runs.weights(name, iteration)) < BOUND
    assert runs.losses(name) == pytest.approx(runs.losses(f"{kind}_one"), abs=2e-5)
    before = load_file(runs.folder / "base" / "model.safetensors")
    if kind == "full":
        moved = {key.removeprefix("llm."): value for key, value in one.items()}
        assert largest({key: moved[key] for key in before}, before) > 1000 * BOUND
    else:
        assert all(value.abs().max() > 1000 * BOUND for value in one.values())


@pytest.mark.parametrize(("kind", "way"), few_fast(RESUMED, [("full", "fsdp")]))
def test_a_resumed_run_ends_in_the_same_bits(runs, kind, way):
    runs.need_way(way, resumed=True)
    whole = runs.weights(f"{kind}_{way}")
    resumed = runs.weights(f"{kind}_{way}_resumed")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert runs.losses(f"{kind}_{way}_resumed") == runs.losses(f"{kind}_{way}")[5:]


@pytest.mark.slow
def test_fsdp_goes_on_with_another_number_of_processes(runs):
    runs.need_way("fsdp")
    runs.need("fsdp_alone")
    assert largest(runs.weights("full_one", 40), runs.weights("full_fsdp_alone", 40)) < BOUND
    assert len(runs.losses("full_fsdp_alone")) == 5


@pytest.mark.slow
def test_zero_refuses_another_number_of_processes(runs, tmp_path):
    """Its parts belong to the ranks that wrote them; what can be done is said."""
    runs.need_way("zero2")
    runs.begin_again("full_zero2", "full_zero2_alone")
    more = ("--resume", "--resume-allow", "config,world_size")
    words = runs.words("full_zero2_alone", "full", "zero2", 1, *more)
    done = run("-m", "xtuner", "train", *words, status=1)
    assert "ZeRO's parts of 2 processes cannot be put together by 1" in done.stderr
    assert "resume with 2 processes" in done.stderr and "load_from=" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("kind", "way"), few_fast([*EXPORTED, ("full", "zero1"), ("full", "zero2")], FAST)
)
def test_what_is_converted_is_the_model_of_one_process(runs, kind, way, tmp_path, capsys):
    runs.need_way(way)
    name = f"{kind}_{way}"
    files = []
    for source, iteration in ((f"{kind}_one", 40), (name, 20)):
        checkpoint = runs.folder / source / f"iter_{iteration}.pth"
        words = [str(checkpoint.with_name("scale_config.py")), str(checkpoint)]
        assert (
            main(["convert", "pth_to_hf", *words, str(tmp_path / source), "--dtype", "fp32"]) == 0
        )
        files.append(next((tmp_path / source).glob("*.safetensors")))
    one, converted = map(load_file, files)
    assert largest(one, converted) < BOUND
    if (kind, way) in EXPORTED:  # the training's own export (HFCheckpointHook)
        exported = load_file(runs.folder / name / "hf_model" / files[1].name)
        assert largest(exported, converted) == 0
