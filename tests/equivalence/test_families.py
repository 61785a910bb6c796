"""Our own classes on two processes train what one process does, in each way of sharing the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.equivalence.runs import train, train_on_ranks
from tests.equivalence.test_sequence_parallel import CONFIG, KINDS, differences
from tests.helpers.architectures import make_architecture
from tests.helpers.hub_models import MODELS
from tests.helpers.tiers import slow
from xtuner.model.transformers_models.auto import AutoConfig, AutoModelForCausalLM

FAMILIES: dict[str, dict[str, Any]] = {
    "internlm2_5": {"max_position_embeddings": 16},  # rows are longer: their rotary is scaled
    "chatglm2": {},
    "baichuan_13b": {},  # ALiBi
    "qwen": {},
    "minicpm": {},
    "deepseek": {},
}
"""Changes to the ``config.json`` of ``hub_models``."""
STEPS, PROCESSES, VOCABULARY = 4, 2, 512
ZERO2, ZERO3 = "deepspeed_zero2", "deepspeed_zero3"
# Family, kind of training, processes that share a row, and how weights are distributed.
RUNS = [
    (family, kind, size, way)
    for kind, size, way in (("full", 1, "--fsdp"), ("full", 2, ""), ("lora", 2, ""))
    for family in FAMILIES
]
RUNS += [(family, "full", 1, ZERO2) for family in ("chatglm2", "deepseek")]
# A process keeps ZeRO-3 in mind, so that comes last. Experts without a token have to be gathered
# as well: the ranks of a shared row choose others.
RUNS += [(family, "full", 1, ZERO3) for family in ("internlm2_5", "baichuan_13b")]
RUNS += [("deepseek", "lora", 2, ZERO3)]
FAST = [("chatglm2", "full", 1, "--fsdp"), ("baichuan_13b", "full", 2, "")]


def save_family(folder: Path, family: str) -> Path:
    model = MODELS[family]
    fields = {**model.sizes, **model.config, model.vocabulary: VOCABULARY, **FAMILIES[family]}
    fields |= {"torch_dtype": "float32"}
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    config.architectures = [model.architecture]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def options(base: Path, kind: str, size: int, ways: int) -> list[str]:
    words = [f"base={base}", f"sequence_parallel_size={size}", f"ways={ways}", f"steps={STEPS}"]
    return ["--cfg-options", *words, *KINDS[kind]]


# One test: the processes that are forked go through all runs.
@pytest.mark.parametrize("compared", [FAST, slow(RUNS)], ids=["few", "all"])
def test_two_processes_train_what_one_does(compared, tmp_path):
    families = {family for family, *_ in compared}
    bases = {family: save_family(tmp_path / family, family) for family in families}
    for family, kind in {run[:2] for run in compared}:
        words = options(bases[family], kind, 1, 1)
        status, printed = train(CONFIG, tmp_path / f"{family}_{kind}", *words)
        assert status == 0, printed
    runs = []
    for family, kind, size, way in compared:
        flags = ["--deepspeed", way] if way.startswith("deepspeed") else way.split()
        words = [*flags, *options(bases[family], kind, size, PROCESSES // size)]
        runs.append([CONFIG, "--work-dir", tmp_path / f"{family}_{kind}_{size}{way}", *words])
    train_on_ranks(PROCESSES, runs, tmp_path)
    off = [
        f"{family}, {kind}, {size} to a row, {way}: {difference}"
        for family, kind, size, way in compared
        for difference in differences(
            tmp_path / f"{family}_{kind}", tmp_path / f"{family}_{kind}_{size}{way}", STEPS
        )
    ]
    assert not off, "\n".join(off)


@pytest.mark.parametrize("kind", ["full", slow("lora")])
def test_a_vision_language_class_on_rows_of_text(kind, tmp_path):
    """Its tower gets no gradient: two processes would wait for it."""
    base = tmp_path / "base"
    make_architecture("gemma3", attention="eager").save_pretrained(base)
    status, printed = train(CONFIG, tmp_path / "one", *options(base, kind, 1, 1))
    assert status == 0, printed
    run = [CONFIG, "--work-dir", tmp_path / "two", *options(base, kind, 1, PROCESSES)]
    train_on_ranks(PROCESSES, [run], tmp_path)
    assert not [*differences(tmp_path / "one", tmp_path / "two", STEPS)]
