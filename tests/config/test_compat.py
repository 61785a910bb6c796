"""Published spellings become today's before a run."""

from xtuner.config import load_config
from xtuner.config.compat import adapt_published

CONFIG = """\
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM
model = dict(llm=dict(type=AutoModelForCausalLM.from_pretrained, {keyword}))
train_dataset = dict(dataset=dict(type=load_dataset, path='p', ignore_verifications=True))
train_dataloader = dict(dataset=train_dataset)
"""


def adapted(tmp_path, keyword):
    path = tmp_path / "published.py"
    path.write_text(CONFIG.format(keyword=keyword))
    cfg = load_config(path)
    return cfg, adapt_published(cfg)


def test_dtype(tmp_path):
    cfg, said = adapted(tmp_path, "torch_dtype=torch.float16")
    assert str(dict.__getitem__(cfg.model.llm, "dtype")) == "float16"
    assert "torch_dtype" not in cfg.model.llm
    assert len(said) == 1 and "ignore_verifications" in said[0]


def test_eight_bits(tmp_path):
    cfg, _ = adapted(tmp_path, "load_in_8bit=True")
    assert cfg.model.llm.quantization_config.load_in_8bit is True
    assert "load_in_8bit" not in cfg.model.llm


def test_verifications_everywhere(tmp_path):
    cfg, _ = adapted(tmp_path, "load_in_8bit=False")
    for dataset in (cfg.train_dataset.dataset, cfg.train_dataloader.dataset.dataset):
        assert dataset.verification_mode == "no_checks"
        assert "ignore_verifications" not in dataset
    assert "quantization_config" not in cfg.model.llm


def test_nothing_to_do():
    assert adapt_published(load_config("quickstart_qlora")) == []
