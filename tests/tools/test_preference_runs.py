"""Preference runs as typed: train, convert, merge, and the rewards that ``xtuner chat`` shows."""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from tests.e2e.test_printed_commands import run_printed
from tests.helpers.hub_models import save_hub_model
from tests.helpers.tiny import save_tiny
from xtuner.entry_point import main
from xtuner.export import verify
from xtuner.export.trained_weights import TrainedWeights
from xtuner.tools.chat_reward import score

ASKED = "question 1\nyes\nquestion 1\nno, never\nexit\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("偏好 runs")
    save_tiny(folder / "base")
    save_hub_model(folder / "internlm2", "internlm2_5")
    rows = []
    for n in range(6):
        ask = {"role": "user", "content": f"question {n}"}
        yes, no = ({"role": "assistant", "content": text} for text in ("yes", "no, never"))
        rows.append({"chosen": [ask, yes], "rejected": [ask, no]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder


def train(folder, name, *options):
    """Train; the work dir and what was printed."""
    words = [
        f"pretrained_model_name_or_path={folder / 'base'}",
        "train_dataloader.dataset.dataset.path=json",
        f"train_dataloader.dataset.dataset.data_files={folder / 'rows.jsonl'}",
        "max_length=96",
        "accumulative_counts=1",
        "max_epochs=12",
        "lr=5e-3",
        *options,
    ]
    out = folder / f"{name}_{len(options)}"
    typed = [
        "train",
        name,
        "--work-dir",
        str(out),
        "--overwrite",
        "--seed",
        "0",
        "--cfg-options",
        *words,
    ]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(typed) == 0
    return out, said.getvalue()


def last_metrics(out):
    return json.loads((out / "metrics.jsonl").read_text("utf-8").splitlines()[-1])


@pytest.fixture(scope="module")
def reward_adapter(folder):
    """Work dir, and what the printed commands showed."""
    name = "internlm2_chat_1_8b_reward_lora_varlenattn_ultrafeedback"
    out, said = train(folder, name, "reward_token_id=2")
    return out, run_printed(said, ASKED)


def test_a_reward_model_learns_and_says_so(reward_adapter):
    found = last_metrics(reward_adapter[0])
    assert found["reward_acc"] == 1
    assert found["chosen_rewards"] > found["rejected_rewards"]


def rewards(said):
    return [float(text) for text in re.findall(r"reward: (-?[\d.]+)", said)]


def test_chat_shows_rewards_and_merging_keeps_them(folder, reward_adapter, capsys, tmp_path):
    out, ran = reward_adapter
    base, adapter = str(folder / "base"), str(out / "hf")
    capsys.readouterr()
    assert main(["convert", "merge", base, adapter, str(tmp_path / "我的 merged")]) == 0
    ran |= run_printed(capsys.readouterr().out, ASKED)
    shown = [rewards(said) for command, said in ran.items() if " chat " in command]
    assert shown[0] == pytest.approx(shown[1], abs=2e-3)
    assert shown[0][0] > shown[0][1]


def test_a_full_reward_model_loads_in_stock_transformers(folder, capsys):
    name = "internlm2_chat_1_8b_reward_full_varlenattn_ultrafeedback"
    out, said = train(folder, name, "reward_token_id=2", "lr=1e-3")
    (checkpoint,) = out.glob("iter_*.pth")
    *_, chat = run_printed(said, ASKED).values()
    yes, no = rewards(chat)
    assert yes > no
    model = AutoModelForSequenceClassification.from_pretrained(out / "hf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out / "hf")
    trained = torch.load(checkpoint, weights_only=True)["state_dict"]
    torch.testing.assert_close(model.score.weight, trained["v_head.weight"])
    yes, no = (score(model, tokenizer, "question 2", text, 2) for text in ("yes", "no, never"))
    assert yes > no


def convert_large(checkpoint: Path, out: Path, capsys: Any, monkeypatch: Any) -> None:
    """Convert a model that counts as large: each tensor of the files is compared."""
    with monkeypatch.context() as patch:
        patch.setattr(verify, "AUTO_VERIFY_BYTES", 0)
        words = ["convert", "pth_to_hf", str(checkpoint)]
        assert main([*words, str(out)]) == 0
        assert "tensors were read again" in capsys.readouterr().out
        read = TrainedWeights.read
        change: Any = lambda self, name: read(self, name) + (name == "v_head.weight")  # noqa: E731
        patch.setattr(TrainedWeights, "read", change)
        assert main([*words, str(out.with_name("wrong"))]) == 1
        assert "score.weight" in capsys.readouterr().err


def test_a_reward_model_of_internlm2_is_the_hubs(folder, capsys, monkeypatch):
    name = "internlm2_chat_1_8b_reward_full_varlenattn_ultrafeedback"
    base = f"pretrained_model_name_or_path={folder / 'internlm2'}"
    out, _ = train(folder, name, "reward_token_id=5", "lr=1e-3", base)
    (checkpoint,) = out.glob("iter_*.pth")
    convert_large(checkpoint, out / "hf", capsys, monkeypatch)
    config = json.loads((out / "hf/config.json").read_text("utf-8"))
    assert config["architectures"] == ["InternLM2ForRewardModel"]
    assert config["auto_map"]["AutoModel"] == "modeling_internlm2.InternLM2ForRewardModel"
    assert config["reward_token_id"] == 5
    model = AutoModel.from_pretrained(out / "hf", dtype=torch.float32)
    trained = torch.load(checkpoint, weights_only=True)["state_dict"]
    torch.testing.assert_close(model.v_head.weight, trained["v_head.weight"])
    monkeypatch.setattr("sys.stdin", io.StringIO("question 2\nyes\nquestion 2\nno, never\nexit\n"))
    capsys.readouterr()
    assert main(["chat", str(out / "hf")]) == 0
    yes, no = rewards(capsys.readouterr().out)
    assert yes > no


def test_a_merged_reward_adapter_of_internlm2_is_the_hubs(folder, capsys, monkeypatch):
    name = "internlm2_chat_1_8b_reward_lora_varlenattn_ultrafeedback"
    base = folder / "internlm2"
    words = ("reward_token_id=5", f"pretrained_model_name_or_path={base}", "max_epochs=2")
    out, _ = train(folder, name, *words)
    (checkpoint,) = out.glob("iter_*.pth")
    convert_large(checkpoint, out / "hf", capsys, monkeypatch)
    merged = out / "merged"
    assert main(["convert", "merge", str(base), str(out / "hf"), str(merged)]) == 0
    assert "verified" in capsys.readouterr().out
    config = json.loads((merged / "config.json").read_text("utf-8"))
    assert config["architectures"] == ["InternLM2ForRewardModel"]
    assert config["auto_map"]["AutoModel"] == "modeling_internlm2.InternLM2ForRewardModel"
    assert config["reward_token_id"] == 5
    names = load_file(merged / "model.safetensors").keys()
    assert "v_head.weight" in names and "score.weight" not in names
    model = AutoModel.from_pretrained(merged, dtype=torch.float32)
    trained = torch.load(checkpoint, weights_only=True)["state_dict"]["v_head.weight"]
    torch.testing.assert_close(model.v_head.weight, trained, rtol=0, atol=2e-3)  # in bf16
    old = as_earlier_versions(merged, out / "old")
    lines = "question 1\nyes\nexit\n"
    shown = []
    for words in ([base, "--adapter", out / "hf"], [merged], [old]):
        capsys.readouterr()
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        assert main(["chat", *map(str, words)]) == 0
        shown += rewards(capsys.readouterr().out)
    # a processor with bf16 computes in it: one step of it is 2^-6 here
    assert shown[1] == pytest.approx(shown[0], abs=2**-5) and shown[2] == shown[1]


def as_earlier_versions(merged, out):
    """The folder as earlier versions merged it: one of transformers' classifiers."""
    shutil.copytree(merged, out)
    weights = load_file(out / "model.safetensors")
    weights["score.weight"] = weights.pop("v_head.weight")
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text("utf-8"))
    config["architectures"] = ["InternLM2ForSequenceClassification"]
    del config["reward_token_id"]
    (out / "config.json").write_text(json.dumps(config), "utf-8")
    return out


@pytest.mark.slow
def test_a_precomputed_reference_trains_the_same_and_is_kept(folder, capsys):
    name = "internlm2_chat_1_8b_dpo_full_varlenattn"
    options = ("max_epochs=1", "optim_wrapper.dtype=float32")
    live, said = train(folder, name, *options)
    *_, chat = run_printed(said).values()
    assert "assistant: " in chat
    ahead, _ = train(folder, name, *options, "model.precompute_reference=True")
    assert last_metrics(ahead)["loss"] == pytest.approx(last_metrics(live)["loss"], rel=1e-4)
    assert last_metrics(live)["reward_margin"] != 0
    (file,) = ahead.glob("reference_*.safetensors")
    with safe_open(str(file), "pt") as kept:
        assert kept.get_tensor("ref_chosen_logps").shape == (6,)
        assert int(kept.get_tensor("pairs").sum()) == 6
    _, said = train(folder, name, *options, "model.precompute_reference=True")
    assert "computing the reference" not in said
