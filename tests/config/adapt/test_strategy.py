"""Which strategy a run uses, and what DeepSpeed's settings become."""

import json

import pytest
from mmengine.config import Config

from xtuner.config.adapt.strategy import adapt_strategy
from xtuner.utils.errors import UserError


def config(**more):
    return Config(
        dict(
            optim_wrapper=dict(dtype="float32", accumulative_counts=4, clip_grad=dict(max_norm=1)),
            train_dataloader=dict(batch_size=2),
            **more,
        )
    )


def settings(cfg):
    return cfg.strategy.config


@pytest.mark.parametrize(
    ("name", "stage", "offload"),
    [
        ("1", 1, ()),
        ("2", 2, ()),
        ("2_offload", 2, ("optimizer",)),
        ("3", 3, ()),
        ("3_offload", 3, ("optimizer", "param")),
    ],
)
def test_published_names(name, stage, offload):
    cfg = config()
    assert adapt_strategy(cfg, deepspeed=f"deepspeed_zero{name}") == []
    zero = settings(cfg)["zero_optimization"]
    assert zero["stage"] == stage
    for part in ("optimizer", "param"):
        device = zero.get(f"offload_{part}", {}).get("device", "none")
        assert device == ("cpu" if part in offload else "none")
    assert settings(cfg)["train_micro_batch_size_per_gpu"] == 2
    assert settings(cfg)["gradient_accumulation_steps"] == 4
    assert settings(cfg)["gradient_clipping"] == 1.0
    assert "auto" not in json.dumps(settings(cfg).to_dict())


def test_a_file_is_read_and_what_disagrees_is_said(tmp_path):
    file = tmp_path / "mine.json"
    given = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 4,
        "optimizer": {"type": "AdamW"},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
    }
    file.write_text(json.dumps(given))
    cfg = config()
    said = "\n".join(adapt_strategy(cfg, deepspeed=str(file)))
    assert "train_micro_batch_size_per_gpu=8" in said and "2 is used" in said
    assert "'optimizer' is left out" in said
    assert "gradient_accumulation_steps" not in said and "train_batch_size" not in said
    assert settings(cfg)["zero_optimization"] == {"stage": 2}


def test_a_strategy_of_the_config_with_the_sections_of_v0_1():
    strategy = dict(
        type="DeepSpeedStrategy",
        config="deepspeed_zero3",
        gradient_accumulation_steps=16,
        sequence_parallel_size=1,
    )
    cfg = config(strategy=strategy)
    said = adapt_strategy(cfg)
    assert len(said) == 1 and "gradient_accumulation_steps=16" in said[0]
    assert settings(cfg)["zero_optimization"]["stage"] == 3


def test_fp16_becomes_what_this_machine_has():
    cfg = config()
    cfg.strategy = dict(type="DeepSpeedStrategy", config=dict(fp16=dict(enabled=True)))
    said = adapt_strategy(cfg)
    assert len(said) == 1 and "float16 does not run on this machine" in said[0]
    assert settings(cfg)["fp16"]["enabled"] is False


def test_fsdp_takes_the_number_format_of_the_config():
    cfg = config()
    adapt_strategy(cfg, fsdp=True, offload=True)
    assert cfg.strategy.dtype == "float32" and cfg.strategy.cpu_offload


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (dict(deepspeed="deepspeed_zero2", fsdp=True), "exclude each other"),
        (dict(deepspeed="deepspeed_zero4"), "deepspeed_zero4"),
    ],
)
def test_what_is_refused(words, expected):
    with pytest.raises(UserError, match=expected):
        adapt_strategy(config(), **words)


def test_a_file_that_is_no_json_is_named_with_its_line(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text('{\n  "a": 1,\n  oops\n}')
    with pytest.raises(UserError, match=r"mine\.json.*3"):
        adapt_strategy(config(), deepspeed=str(file))


def test_another_strategy_is_refused():
    with pytest.raises(UserError, match="ColossalAIStrategy"):
        adapt_strategy(config(strategy=dict(type="ColossalAIStrategy")))


@pytest.mark.parametrize("words", [dict(deepspeed="deepspeed_zero2"), dict(fsdp=True)])
def test_transformers_trainer_has_its_own_way(words):
    cfg = Config(dict(framework="huggingface", training_args=dict()))
    with pytest.raises(UserError, match="Trainer spreads the model in its own way"):
        adapt_strategy(cfg, **words)


@pytest.mark.parametrize("key", ["on_bad_loss", "on_spike"])
def test_deepspeed_cannot_leave_out_a_step(key):
    with pytest.raises(UserError, match=f"train_cfg.{key}"):
        adapt_strategy(config(train_cfg={key: "skip"}), deepspeed="deepspeed_zero2")
    adapt_strategy(config(train_cfg={key: "stop"}), deepspeed="deepspeed_zero2")
    adapt_strategy(config(train_cfg={key: "skip"}), fsdp=True)
