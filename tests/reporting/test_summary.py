"""What people are told before and after a training."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import MessageHub

from tests.engine.toy import make_runner
from xtuner.reporting.summary import count_parameters, next_steps, template_name
from xtuner.utils import PROMPT_TEMPLATE


def runner_of(cfg: dict[str, Any], name: str) -> Any:
    hub = MessageHub.get_instance(name)
    hub.update_info("last_ckpt", "/out dir/iter_9.pth")
    config = Config(cfg)
    object.__setattr__(config, "_filename", "/configs/my.py")
    return SimpleNamespace(cfg=config, work_dir="/out dir", message_hub=hub)


def test_full_training_ends_in_two_commands():
    llm = dict(pretrained_model_name_or_path="/base")
    runner = runner_of(
        dict(model=dict(llm=llm), prompt_template=PROMPT_TEMPLATE.qwen_chat), "summary_full"
    )
    assert [command for _, command in next_steps(runner)] == [
        "xtuner convert pth_to_hf '/out dir/my.py' '/out dir/iter_9.pth' '/out dir/hf'",
        "xtuner chat '/out dir/hf' --prompt-template qwen_chat",
    ]


def test_an_adapter_is_merged_first():
    llm = dict(pretrained_model_name_or_path="/base")
    runner = runner_of(dict(model=dict(llm=llm, lora=dict(r=4))), "summary_lora")
    assert [command for _, command in next_steps(runner)][1:] == [
        "xtuner convert merge /base '/out dir/hf' '/out dir/merged'",
        "xtuner chat '/out dir/merged'",
    ]


def test_the_template_is_told_by_its_name():
    assert template_name(dict(prompt_template=dict(PROMPT_TEMPLATE.zephyr))) == "zephyr"
    assert template_name(dict(prompt_template=PROMPT_TEMPLATE.internlm2_chat)) == "internlm2_chat"
    assert template_name(dict()) is None


def test_parameters_are_counted():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    model[0].requires_grad_(False)
    assert count_parameters(model) == (5, 21)


def test_the_run_and_its_backends_are_shown_and_kept(tmp_path, capsys):
    runner = make_runner(tmp_path)
    runner.model.backends_report = lambda dtype: [("attention", "sdpa", "no CUDA device")]
    runner.train()
    record = json.loads((tmp_path / "run.json").read_text("utf-8"))
    assert record["backends"] == [
        {"concept": "attention", "choice": "sdpa", "reason": "no CUDA device"}
    ]
    assert record["summary"]["backends"] == "attention sdpa"
    assert record["summary"]["output"] == str(tmp_path)
    assert record["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    assert "backends: attention sdpa" in capsys.readouterr().out
