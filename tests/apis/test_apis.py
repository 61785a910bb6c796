"""The published names of `xtuner.apis`, and what they give."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import xtuner.apis as apis
from tests.helpers.forked import run

EXAMPLES = Path(__file__).parents[2] / "examples" / "huggingface_trainer"
NEEDS_DATASET = pytest.mark.skipif(
    importlib.util.find_spec("xtuner.dataset.huggingface") is None,
    reason="the dataset part is not there",
)


def test_every_published_name_is_there():
    for name in apis.__all__:
        assert callable(getattr(apis, name)), name
    assert len(apis.__all__) == 4 + 2 * 18
    assert apis.alpaca_enzh_dataset.__name__ == "alpaca_enzh_dataset"


@pytest.mark.parametrize("kind", ["model", "lora_model", "qlora_model"])
def test_models_train(kind, tiny_llama):
    model, tokenizer = getattr(apis, f"build_{kind}")(str(tiny_llama))
    ids = torch.tensor([tokenizer.encode("What is the capital of France?")])
    model(input_ids=ids, labels=ids).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained and (kind == "model" or all("lora_" in name for name in trained))
    alone = getattr(apis, f"build_{kind}")(str(tiny_llama), return_tokenizer=False)
    assert isinstance(alone, torch.nn.Module)


def test_training_arguments(tmp_path):
    arguments = apis.DefaultTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert arguments.gradient_accumulation_steps == 16
    assert arguments.lr_scheduler_type == "cosine"


@NEEDS_DATASET
@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_hf", "train_lora_hf", "train_qlora_hf"])
def test_examples(script, tiny_llama, tmp_path):
    rows = [{"instruction": "Say yes", "input": "", "output": "yes"}] * 8
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows))
    out = tmp_path / "out"
    words = ["--model_name_or_path", tiny_llama, "--data_path", data, "--output_dir", out]
    words += ["--max_length", "64", "--use_cpu", "--report_to", "none"]
    run(EXAMPLES / f"{script}.py", *words)
    assert list(out.glob("*.safetensors"))
