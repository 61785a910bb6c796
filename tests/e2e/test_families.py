"""The journey with each family's own folder: check, train, resume, convert, merge, chat, reload.

The folders have the hub's layout; their code raises when it runs, so none of it did.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.hub_models import MODELS, save_hub_model
from tests.helpers.tiers import few_fast, slow
from xtuner.entry_point import main
from xtuner.model.transformers_models.auto import AutoModelForCausalLM, AutoTokenizer

QUESTION, ANSWER = "Who are you?", "I am a small assistant."
TEXTS = [
    "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n",
    "请做一下自我介绍。  def add(a, b):\n\treturn a + b</s>",
]


RESUMED = [name for name in MODELS if name not in ("internlm2", "chatglm2", "baichuan2_13b")]
"""One of each ``model_type``, of Baichuan one of each way to tell positions and vocabulary."""
FAST = ("internlm2_5", "chatglm3", "baichuan_7b")
"""Those of `make test`: a tokenizer, a layout of weights and a rotary embedding of each kind."""


def words_of(base: Path, data: Path, out: Path, *options: str) -> list[str]:
    """The words after ``xtuner train CONFIG`` that put a recipe on a tiny folder and tiny data."""
    settings = {
        "pretrained_model_name_or_path": base,
        "alpaca_en_path": data,
        "max_length": 96,
        "max_epochs": 1,
        "save_steps": 2,
        "accumulative_counts": 2,
        "evaluation_freq": 1000,
        "custom_hooks.1.max_new_tokens": 4,  # of the sample answers
    }
    given = [f"{key}={value}" for key, value in settings.items()]
    return ["--work-dir", str(out), "--cfg-options", *given, *options]


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def last_checkpoint(run: Path) -> Path:
    return max(run.glob("iter_*.pth"), key=lambda file: int(file.stem.partition("_")[2]))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder that ``load_dataset`` reads, with the columns of Alpaca."""
    folder = tmp_path_factory.mktemp("data")
    row = {"instruction": QUESTION, "input": "", "output": ANSWER}
    (folder / "train.jsonl").write_text((json.dumps(row) + "\n") * 24, "utf-8")
    return folder


class Journey:
    """A family's folder, and what its QLoRA recipe made of it."""

    def __init__(self, folder: Path, family: str, data: Path) -> None:
        self.model = MODELS[family]
        self.base = save_hub_model(folder / "base", family)
        self.data, self.run = data, folder / "run"
        self.adapter, self.merged = folder / "adapter", folder / "merged"
        assert main(["train", self.model.recipe, *words_of(self.base, data, self.run)]) == 0
        checkpoint = str(last_checkpoint(self.run))
        assert main(["convert", "pth_to_hf", checkpoint, str(self.adapter)]) == 0
        words = [str(self.base), str(self.adapter), str(self.merged)]
        assert main(["convert", "merge", *words]) == 0


@pytest.fixture(scope="module", params=few_fast(MODELS, FAST))
def journey(request, tmp_path_factory, data) -> Journey:
    return Journey(tmp_path_factory.mktemp(request.param), request.param, data)


def test_the_recipe_trains(journey):
    found = losses(journey.run)
    assert found and all(torch.tensor(found).isfinite())
    fields = json.loads((journey.base / "config.json").read_text("utf-8"))
    vocab_size = fields[journey.model.vocabulary]
    assert found[0] == pytest.approx(torch.tensor(float(vocab_size)).log().item(), rel=0.2)


def test_the_config_of_the_run_is_right(journey):
    (config,) = journey.run.glob("*.py")
    assert main(["check-cfg", str(config)]) == 0


@pytest.mark.parametrize("journey", few_fast(RESUMED, FAST), indirect=True)
def test_a_stopped_run_goes_on(journey, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(journey.run, run)
    wanted, last = losses(run)[-1], last_checkpoint(run)
    (earlier,) = set(run.glob("iter_*.pth")) - {last}
    (run / "metrics.jsonl").unlink()
    words = words_of(journey.base, journey.data, run)
    assert main(["train", journey.model.recipe, "--resume", str(earlier), *words]) == 0
    assert losses(run)[-1] == pytest.approx(wanted, rel=1e-5)


def test_every_file_is_carried_over(journey):
    names = {file.name for file in journey.base.iterdir() if file.suffix != ".safetensors"}
    if (journey.base / "tokenizer.json").is_file():  # transformers' own tokenizers do without
        names.discard("special_tokens_map.json")
    assert names <= {file.name for file in journey.merged.iterdir()}
    vocabularies = {"tokenizer.model", "qwen.tiktoken"} & names
    assert vocabularies or "tokenizer.json" in names
    for name in vocabularies | {name for name in names if name.endswith(".py")}:
        assert (journey.merged / name).read_bytes() == (journey.base / name).read_bytes()


def test_config_json_stays_the_hubs(journey):
    before, after = (
        json.loads((folder / "config.json").read_text("utf-8"))
        for folder in (journey.base, journey.merged)
    )
    assert after == before


def test_tensors_keep_the_hubs_names(journey):
    before, after = (
        load_file(folder / "model.safetensors") for folder in (journey.base, journey.merged)
    )
    assert {name: (t.shape, t.dtype) for name, t in before.items()} == {
        name: (t.shape, t.dtype) for name, t in after.items()
    }
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_tokenizer_gives_the_same_ids(journey):
    ours, theirs, adapters = (
        AutoTokenizer.from_pretrained(folder)
        for folder in (journey.base, journey.merged, journey.adapter)
    )
    # the code of these two reads no eos in a text; exports declare it, so that templates work
    without = journey.model.tokenizer.startswith(("chatglm", "baichuan2"))
    eos = "" if without else "</s>"
    for text in (text.replace("</s>", eos) for text in TEXTS):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"] == adapters(text)["input_ids"]


@torch.no_grad()
def test_the_merged_model_is_base_and_adapter(journey):
    from peft import PeftModel

    ids = torch.arange(5, 45)[None]
    base = AutoModelForCausalLM.from_pretrained(journey.base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, journey.adapter).eval()
    merged = AutoModelForCausalLM.from_pretrained(journey.merged, dtype=torch.float32).eval()
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=0, atol=0.02)


def test_it_answers(journey, capsys, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\nexit\n"))
    capsys.readouterr()
    assert main(["chat", str(journey.merged), "--max-new-tokens", "6"]) == 0
    assert re.search(r"assistant: .*\S", capsys.readouterr().out, re.DOTALL)


@pytest.mark.parametrize("weights", [slow("full"), "lora"])
def test_training_ends_in_the_answer(weights, data, tmp_path, capsys, monkeypatch):
    """InternLM2.5, all weights and LoRA, on one sentence; the export gives that answer."""
    import io

    base = save_hub_model(tmp_path / "base", "internlm2_5", initializer_range=0.2)
    recipe = "internlm2_1_8b_full_alpaca_e3" if weights == "full" else MODELS["internlm2_5"].recipe
    options = ["max_epochs=8", "lr=3e-3", "save_steps=1000", "accumulative_counts=1"]
    if weights == "lora":
        options += ["model.llm.quantization_config=None", "lr=1e-2", "max_epochs=10"]
        options += ["model.lora.lora_alpha=64", "model.lora.lora_dropout=0"]
    run = tmp_path / "run"
    assert main(["train", recipe, *words_of(base, data, run, *options)]) == 0
    assert losses(run)[-1] < (0.1 if weights == "full" else 1.0)
    out = tmp_path / "hf"
    assert main(["convert", "pth_to_hf", str(last_checkpoint(run)), str(out)]) == 0
    where: list[Any] = [str(out)] if weights == "full" else [str(base), "--adapter", str(out)]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\nexit\n"))
    capsys.readouterr()
    assert main(["chat", *where, "--max-new-tokens", "20"]) == 0
    assert ANSWER in capsys.readouterr().out
