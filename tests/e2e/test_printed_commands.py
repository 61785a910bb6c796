"""Every command that ``train`` and ``convert`` print works as it is printed.

Those of preference models are run in ``tests/tools/test_preference_runs.py``, of LLaVA and InternVL
in ``test_llava_runs.py`` and ``test_chat_internvl.py``, of FSDP and ZeRO in
``tests/engine/test_reference.py``, of vision-language models in ``test_vision_language.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import re
import shlex
import sys
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from mmengine.config import Config
from mmengine.logging import MessageHub

from tests.e2e.test_own_code import CONFIG, say
from tests.helpers.image_text import image_text_folder, make_image
from tests.helpers.tiers import slow
from xtuner.checkpoint.resume import resume_command
from xtuner.entry_point import COMMANDS, main
from xtuner.reporting.summary import next_steps
from xtuner.utils.templates import PROMPT_TEMPLATE

PRINTED = re.compile(r"^ *(?:xtuner  +)?(xtuner [a-z].*)$", re.M)
QUANTIZED = (
    "dtype=torch.float32, quantization_config=dict(type=BitsAndBytesConfig, load_in_4bit=True)"
)
LORA = "    lora=dict(type=LoraConfig, r=4, lora_alpha=8, task_type='CAUSAL_LM'),\n"


def parsed(command: str) -> argparse.Namespace:
    """The arguments that a command gets."""
    words, level = shlex.split(command)[1:], COMMANDS
    while (found := level[words.pop(0)]).commands:
        level = found.commands
    parser = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module(f"xtuner.tools.{found.module}").add_arguments(parser)
    return parser.parse_args(words)


def run_printed(said: str, typed: str = "hi\nexit\n", image: Path | None = None) -> dict[str, str]:
    """Run the printed commands, and those that they print, each once.

    Args:
        said: what a command has printed.
        typed: what is typed in ``chat``.
        image: in place of ``FILE``, where a command asks about an image of the user's.

    Returns:
        What each command printed, in the order in which they ran.
    """
    waiting, outputs, merged = PRINTED.findall(said), {}, []
    assert waiting, said
    while waiting:
        command = waiting.pop(0)
        words = [str(image) if word == "FILE" else word for word in shlex.split(command)[1:]]
        if command in outputs or words[:-1] in merged:  # merged into another folder
            parsed(command)
            continue
        if words[:2] == ["convert", "merge"]:
            merged.append(words[:-1])
        if words[0] == "chat":
            words += ["--max-new-tokens", "3"]
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(StringIO()) as out:
            patch.setattr(sys, "stdin", StringIO(typed))
            assert main(words) == 0, command
        outputs[command] = out.getvalue()
        waiting += PRINTED.findall(outputs[command])
    return outputs


def config_text(base: str, rows: str, template: str, lora: bool) -> str:
    """The config of ``test_own_code`` with nothing of the user's own."""
    text = CONFIG.replace("{base!r}", repr(base)).replace("{rows!r}", repr(rows))
    for own in ("with read_base():\n    from .map_of_mine import map_fn\n", "map_of_mine"):
        text = text.replace(own, "")
    text = re.sub(
        r"from .bell_of_mine import Bell\n\nclass Ring.*?float32\)\n", "", text, flags=re.S
    )
    text = text.replace("[dict(type=Bell), dict(type=Ring)]", "[]").replace("=map_fn", "=None")
    text = text.replace("PROMPT_TEMPLATE.qwen_chat", f"PROMPT_TEMPLATE.{template}")
    if lora:
        text = "from peft import LoraConfig\n" + text.replace(
            "SupervisedFinetune,\n    llm", f"SupervisedFinetune,\n{LORA}    llm"
        )
    return text.replace("max_iters=2", "max_iters=1")


@pytest.mark.parametrize(
    ("template", "method"),
    [("auto", "full"), ("auto", "lora"), ("auto", "qlora"), ("internlm2_chat", "lora")],
)
def test_they_run(tmp_path, tiny_llama, capsys, monkeypatch, template, method):
    lora = method != "full"
    folder = tmp_path / "我的 run's"
    folder.mkdir()
    rows = folder / "rows.jsonl"
    rows.write_text(json.dumps({"conversation": [{"input": "hi", "output": "yes"}]}) + "\n")
    config = folder / "a config.py"
    text = config_text(str(tiny_llama), str(rows), template, lora)
    if method == "qlora":
        text = "from transformers import BitsAndBytesConfig\n" + text
        text = text.replace("dtype=torch.float32),", f"{QUANTIZED}),")
        assert QUANTIZED in text
    config.write_text(text, "utf-8")
    said = say(capsys, "train", config, "--work-dir", folder / "work dir")
    printed = PRINTED.findall(said)
    assert len(printed) == (3 if lora else 2)
    monkeypatch.chdir(tmp_path)
    ran = run_printed(said)
    assert set(printed) <= set(ran)
    assert sum("assistant: " in output for output in ran.values()) >= (2 if lora else 1)


@pytest.mark.parametrize("images", [False, slow(True)])
def test_those_of_dpo_on_own_pairs(tmp_path, tiny_llama, capsys, monkeypatch, images):
    """From ``copy-cfg --data`` to an answer."""
    monkeypatch.chdir(tmp_path)
    photo = tmp_path / "一 a.png"
    make_image(28, 28, 0).save(photo)
    row = {"prompt": "hi", "chosen": "yes", "rejected": "no"}
    row |= {"images": [photo.name]} if images else {}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    base = image_text_folder("qwen2_5_vl") if images else tiny_llama
    (train,) = PRINTED.findall(
        say(capsys, "copy-cfg", "--model", base, "--data", "pairs.jsonl", "my configs")
    )
    options = ["max_epochs=1"] + ["dataloader_num_workers=0"] * images
    said = say(capsys, *shlex.split(train)[1:], "--cfg-options", *options)
    assert len(PRINTED.findall(said)) == 3
    ran = run_printed(said, image=photo)
    assert sum("assistant: " in output for output in ran.values()) >= 2


MODELS = {
    "full": dict(llm=dict(pretrained_model_name_or_path="/a base")),
    "qlora": dict(llm=dict(pretrained_model_name_or_path="/a base"), lora=dict(r=4)),
    "reward": dict(
        type=type("RewardModel", (), {}),
        llm=dict(pretrained_model_name_or_path="/a base"),
        lora=dict(r=4),
    ),
    "dpo": dict(type=type("DPO", (), {}), llm=dict(pretrained_model_name_or_path="/a base")),
    "llava": dict(
        llm=dict(pretrained_model_name_or_path="/a base"), visual_encoder=dict(), llm_lora=dict()
    ),
    "internvl": dict(model_path="/a base", llm_lora=dict()),
}


@pytest.mark.parametrize("template", list(PROMPT_TEMPLATE))
@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_training_prints_what_parses(kind, template):
    hub = MessageHub.get_instance(f"printed_{kind}_{template}")
    hub.update_info("last_ckpt", "/我的 run/iter_9.pth")
    config = Config(dict(model=MODELS[kind], prompt_template=PROMPT_TEMPLATE[template]))
    object.__setattr__(config, "_filename", "/configs/我的 config.yaml")
    runner = SimpleNamespace(cfg=config, work_dir="/我的 run", message_hub=hub)
    steps = [parsed(command) for _, command in next_steps(runner)]
    assert steps[0].words == ["/我的 run/我的 config.py", "/我的 run/iter_9.pth", "/我的 run/hf"]
    images = kind in ("llava", "internvl")
    assert len(steps) == (1 if images else 3 if kind == "qlora" else 2)
    wanted = template if kind in ("full", "qlora", "dpo") and template != "auto" else None
    found = getattr(steps[-1], "prompt_template", None)
    assert (found is None) == (wanted is None)
    assert found is None or PROMPT_TEMPLATE[found] == PROMPT_TEMPLATE[wanted]  # some are the same


def test_resuming(tmp_path):
    work = tmp_path / "我的 run"
    work.mkdir()
    (work / "a config.py").write_text("model = dict()\n")
    printed = resume_command(work / "iter_4.pth")
    args = parsed(printed[printed.index("xtuner train") :])
    assert (args.config, args.work_dir, args.resume) == (
        str(work / "a config.py"), str(work), True,
    )  # fmt: skip
