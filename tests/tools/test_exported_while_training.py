"""What HFCheckpointHook writes at the end of a training is what convert makes of its checkpoint."""

import json

import pytest
from safetensors.torch import load_file

from tests.equivalence.runs import make_small_base, train
from xtuner.entry_point import main

HOOK = """
from xtuner.engine.hooks import HFCheckpointHook

custom_hooks = [dict(type=HFCheckpointHook)]
"""


@pytest.mark.parametrize(
    ("name", "weights"),
    [("quickstart", "model.safetensors"), ("quickstart_lora", "adapter_model.safetensors")],
)
def test_exported_equals_converted(tmp_path, monkeypatch, name, weights):
    monkeypatch.chdir(tmp_path)
    make_small_base(tmp_path)
    assert main(["copy-cfg", name, "."]) == 0
    config = tmp_path / f"{name}_copy.py"
    config.write_text(config.read_text() + HOOK)
    words = ["train_cfg.max_epochs=None", "train_cfg.max_iters=2"]
    status, printed = train(config, tmp_path / "run", "--cfg-options", *words)
    assert status == 0, printed
    exported, converted = tmp_path / "run" / "hf_model", tmp_path / "converted"
    assert main(["convert", "pth_to_hf", str(tmp_path / "run" / "iter_2.pth"), str(converted)]) == 0
    ours, theirs = load_file(exported / weights), load_file(converted / weights)
    assert {key: value.shape for key, value in ours.items()} == {
        key: value.shape for key, value in theirs.items()
    }
    assert all(ours[key].equal(theirs[key]) for key in ours)
    same = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    if "adapter" in weights:
        same.append("xtuner_base.json")
    for file in same:
        assert (exported / file).read_text() == (converted / file).read_text(), file
    stops = [
        json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
        for folder in (exported, converted)
    ]
    assert stops[0] == stops[1]
