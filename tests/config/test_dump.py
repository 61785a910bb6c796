"""A dumped config is the same config again, readable, and an override still reaches in it."""

import pytest
from mmengine.config.lazy import LazyAttr, LazyObject

from xtuner.config import dump_config, load_config
from xtuner.config.dump import same_config, spelled_out
from xtuner.config.load import load_source
from xtuner.config.source import ConfigSource
from xtuner.config.values import own_values
from xtuner.config.writer import Writer

NAME = "internlm2_chat_7b_qlora_alpaca_e3"


def again(text):
    return load_source(ConfigSource(text, "again.py"))


def test_own_text_is_kept():
    cfg = load_config(NAME)
    assert dump_config(cfg) == cfg._text


def changed():
    """A config changed as adapting to a machine changes it."""
    cfg = load_config(NAME, ["lr=1e-5"])
    cfg.env_cfg.dist_cfg.backend = "gloo"
    dict.__setitem__(cfg.optim_wrapper, "type", LazyObject("mmengine.optim", "OptimWrapper"))
    dict.pop(cfg.optim_wrapper, "loss_scale")
    cfg.train_dataloader.dataset.max_length = 99  # a place that shares a dict with another
    cfg.work_dir = "./out"
    return cfg


def test_changes_come_back():
    cfg = changed()
    text = dump_config(cfg)
    assert same_config(again(text), cfg)
    assert "# " in text and "from mmengine.optim import OptimWrapper" in text
    assert not same_config(again(text), load_config(NAME))


def test_override_reaches_in_a_dump(tmp_path):
    path = tmp_path / "resolved.py"
    path.write_text(dump_config(changed()), "utf-8")
    cfg = load_config(path, ["lr=5e-5", "max_epochs=7"])
    assert cfg.optim_wrapper.optimizer.lr == 5e-5
    assert cfg.train_cfg.max_epochs == 7
    assert cfg.env_cfg.dist_cfg.backend == "gloo"


def test_objects_become_imports():
    import torch
    from transformers import AutoTokenizer

    cfg = load_config(NAME)
    dict.__setitem__(cfg.optim_wrapper, "type", torch.optim.AdamW)
    dict.__setitem__(cfg.model.llm, "dtype", torch.float32)
    dict.__setitem__(cfg.tokenizer, "type", AutoTokenizer.from_pretrained)
    cfg.optim_wrapper.limit = float("inf")
    text = spelled_out(cfg)
    assert "dtype=torch.float32" in text
    assert "type=AutoTokenizer.from_pretrained" in text
    assert same_config(again(text), cfg)


def test_same_class_from_elsewhere_is_no_change():
    """What adapting puts in may be imported from the module that defines it."""
    cfg = load_config(NAME)
    before = cfg._text
    home = LazyObject("torch.optim.adamw", "AdamW")
    dict.__setitem__(cfg.optim_wrapper.optimizer, "type", home)
    assert dump_config(cfg) == before


def test_imports_of_both_kinds():
    writer = Writer(taken={"AdamW"})
    torch = LazyObject("torch")
    values = [torch, LazyObject("torch", "bfloat16"), LazyAttr("nn", torch)]
    assert writer.line(values) == "[torch, bfloat16, torch.nn]"
    assert writer.line(LazyObject("torch.optim", "AdamW")) == "AdamW_"
    assert writer.imports() == [
        "import torch",
        "from torch import bfloat16",
        "from torch.optim import AdamW as AdamW_",
    ]


def test_local_functions_stay(tmp_path):
    path = tmp_path / "local.py"
    path.write_text(
        "import math\n"
        "from torch.optim import AdamW\n"
        "def my_map_fn(row):\n    return {'a': row.get('b', math)}\n"
        "data = dict(type=AdamW, fn=my_map_fn)\n"
    )
    text = spelled_out(load_config(path))
    assert "import math" in text and "def my_map_fn(row):" in text and "fn=my_map_fn" in text
    assert again(text).data.fn({"b": 9}) == {"a": 9}


@pytest.mark.parametrize("value", [1, 1.5, "a'b\"c\n", None, True, (1,), [], {}, {"a-b": 1, 2: 3}])
def test_plain_values_come_back(value):
    cfg = load_config("quickstart")
    cfg.work_dir = value
    assert own_values(again(spelled_out(cfg)))["work_dir"] == value
    assert same_config(again(dump_config(cfg)), cfg)


def test_keys_that_are_keywords_of_python():
    cfg = load_config("quickstart")
    cfg.work_dir = {"from": "human", "value": [{"class": 1}]}
    assert same_config(again(spelled_out(cfg)), cfg)
    assert same_config(again(dump_config(cfg)), cfg)


def test_a_removed_key_is_deleted_in_the_text():
    cfg = load_config(NAME)
    dict.pop(cfg.model, "lora")
    text = dump_config(cfg)
    assert "del model['lora']" in text and same_config(again(text), cfg)


def test_odd_line_separators_survive(tmp_path):
    path = tmp_path / "odd.py"
    path.write_text(
        "a = 'x\u2028y\x0cz'\nfrom torch.optim import AdamW\nlr = 1\nopt = dict(lr=lr)\n", "utf-8"
    )
    cfg = load_config(path)
    dict.__setitem__(cfg.opt, "type", LazyObject("torch.optim", "SGD"))
    text = dump_config(cfg)
    assert same_config(again(text), cfg) and text.startswith("a = 'x\u2028y\x0cz'\n")
