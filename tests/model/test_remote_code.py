"""Models whose folder brings code: it runs only where asked, and its buffers are right."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, FalconConfig, FalconForCausalLM

from tests.helpers.tiny import make_tokenizer, save_tiny
from xtuner.dataset.collate_fns import default_collate_fn
from xtuner.model import SupervisedFinetune
from xtuner.model.modules import attention
from xtuner.utils.errors import UserError

CODE = """
import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class OwnConfig(PretrainedConfig):
    model_type = "own"

    def __init__(self, vocab_size=64, hidden_size=16, **kwargs):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        super().__init__(**kwargs)


class Body(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        scales = torch.linspace(1.0, 2.0, config.hidden_size)
        self.register_buffer("scales", scales, persistent=False)


class Attention(nn.Module):
    pass


KINDS = {"eager": Attention, "sdpa": Attention}


class OwnForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = OwnConfig
    base_model_prefix = "body"

    def __init__(self, config):
        super().__init__(config)
        self.attention = KINDS[config._attn_implementation]()
        self.model = Body(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, **kwargs):
        return CausalLMOutputWithPast(
            logits=self.head(self.model.embed_tokens(input_ids) * self.model.scales)
        )
"""


@pytest.fixture
def folder(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "modeling_own.py").write_text(CODE, "utf-8")
    names = {"AutoConfig": "OwnConfig", "AutoModelForCausalLM": "OwnForCausalLM"}
    config = {
        "model_type": "own",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {auto: f"modeling_own.{name}" for auto, name in names.items()},
        "vocab_size": len(tokenizer),
        "torch_dtype": "float32",
    }
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    from safetensors.torch import save_file

    torch.manual_seed(0)
    shape = len(tokenizer), 16
    weights = {"model.embed_tokens.weight": torch.randn(shape), "head.weight": torch.randn(shape)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def build(folder, **settings):
    llm = {"type": AutoModelForCausalLM.from_pretrained}
    llm |= {"pretrained_model_name_or_path": str(folder), **settings}
    return SupervisedFinetune(llm=llm, use_activation_checkpointing=False)


def test_code_runs_only_where_the_config_says_so(folder, capsys):
    with pytest.raises(UserError, match=r"modeling_own\.OwnForCausalLM") as refused:
        build(folder)
    assert "trust_remote_code=True" in str(refused.value.hint)
    build(folder, trust_remote_code=True)
    shown = capsys.readouterr().err
    assert f"{folder}/modeling_own.py (modeling_own.OwnForCausalLM)" in shown


def test_its_buffers_are_what_its_code_computes(folder):
    llm = build(folder, trust_remote_code=True).llm
    assert torch.equal(llm.model.scales, torch.linspace(1.0, 2.0, 16))
    assert llm.config._attn_implementation in ("eager", "sdpa")
    ids = torch.arange(8)[None]
    wanted = llm.head(llm.model.embed_tokens(ids) * torch.linspace(1.0, 2.0, 16))
    torch.testing.assert_close(llm(ids).logits, wanted)


def test_it_trains(folder):
    model = build(folder, trust_remote_code=True)
    ids = torch.arange(3, 11)[None]
    loss = model({"input_ids": ids, "labels": ids})["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert float(model.llm.head.weight.grad.norm()) > 0


ROWS = [torch.arange(10, 17), torch.arange(20, 25)]


def packed_loss(folder, rows=ROWS):
    llm = {"type": AutoModelForCausalLM.from_pretrained, "trust_remote_code": True}
    llm |= {"pretrained_model_name_or_path": str(folder)}
    model = SupervisedFinetune(llm, use_varlen_attn=True, use_activation_checkpointing=False)
    instances = [{"input_ids": row, "labels": row} for row in rows]
    return model(**default_collate_fn(instances, use_varlen_attn=True))["loss"]


def test_packed_rows_that_mix_samples_are_computed_one_by_one(folder, caplog):
    code = CODE.replace("* self.model.scales)", "* self.model.scales).cumsum(1)")
    (folder / "modeling_own.py").write_text(code, "utf-8")
    loss = packed_loss(folder)
    assert "OwnForCausalLM computes packed samples one by one" in caplog.text
    shares = [packed_loss(folder, [row]) * (len(row) - 1) for row in ROWS]
    wanted = sum(shares) / sum(len(row) - 1 for row in ROWS)
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)


def test_packed_rows_of_tokens_that_do_not_see_each_other_train(folder):
    assert torch.isfinite(packed_loss(folder))


def test_activation_checkpointing_that_the_code_lacks_is_refused(folder):
    llm = {"type": AutoModelForCausalLM.from_pretrained, "trust_remote_code": True}
    llm |= {"pretrained_model_name_or_path": str(folder)}
    with pytest.raises(UserError, match="does not support activation checkpointing") as refused:
        SupervisedFinetune(llm)
    assert "use_activation_checkpointing = False" in refused.value.hint


@pytest.mark.parametrize("trusted", [True, False])
def test_a_class_of_the_same_name_is_preferred_to_the_folders(tmp_path, trusted):
    save_tiny(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text("utf-8"))
    config["auto_map"] = {
        "AutoConfig": "modeling_llama.LlamaConfig",
        "AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM",
    }
    file.write_text(json.dumps(config), "utf-8")
    (tmp_path / "modeling_llama.py").write_text("raise SystemExit('it ran')\n", "utf-8")
    llm = build(tmp_path, trust_remote_code=trusted).llm
    assert type(llm).__module__ == "transformers.models.llama.modeling_llama"
    assert llm.config._attn_implementation == attention.NAME


def test_a_class_that_chooses_its_attention_by_name_keeps_its_own(tmp_path):
    config = FalconConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    FalconForCausalLM(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model = build(tmp_path)
    ids = torch.arange(3, 11)[None]
    assert torch.isfinite(model({"input_ids": ids, "labels": ids})["loss"])
