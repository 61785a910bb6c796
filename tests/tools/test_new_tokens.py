"""Tokens that the base lacks: trained, converted, chatted with and merged, all the same model."""

from __future__ import annotations

import json
import textwrap

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.tiers import slow
from tests.helpers.tiny import make_tokenizer, save_tiny
from xtuner.config import load_config
from xtuner.entry_point import main
from xtuner.export.weights import Weights
from xtuner.registry import BUILDER
from xtuner.tools.chat_loading import load_for_chat
from xtuner.utils.errors import UserError

CONFIG = """
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from xtuner.model import SupervisedFinetune
from xtuner.utils import PROMPT_TEMPLATE

prompt_template = PROMPT_TEMPLATE.internlm2_chat
tokenizer = dict(type=AutoTokenizer.from_pretrained, pretrained_model_name_or_path={tokenizer!r})
model = dict(
    type=SupervisedFinetune,
    tokenizer=tokenizer,
    llm=dict(
        type=AutoModelForCausalLM.from_pretrained,
        pretrained_model_name_or_path={base!r},
        dtype=torch.float32,
    ),
    {lora}
)
"""
SAVED = 'modules_to_save=["embed_tokens", "lm_head"]'
KINDS = {
    "full": None,
    "default targets": 'target_modules="all-linear"',
    "saved": f'target_modules=["q_proj"], {SAVED}',
    "saved head": 'target_modules=["q_proj"], modules_to_save=["lm_head"]',
    "token indices": 'target_modules=["q_proj"], trainable_token_indices=[3, 7, 11]',
}
ADDED = 88


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Folders of a tokenizer as the base has it, and of one with further tokens."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for name, added in (("same", 0), ("grown", ADDED)):
        tokenizer = make_tokenizer()
        tokenizer.add_tokens([f"<new_{number}>" for number in range(added)])
        tokenizer.save_pretrained(folder / name)
    return folder


def test_single_tokens_beside_new_ones_are_refused(tokenizers, tiny_llama, tmp_path):
    config = tmp_path / "my.py"
    text = textwrap.dedent(CONFIG).format(
        tokenizer=str(tokenizers / "grown"),
        base=str(tiny_llama),
        lora=f"lora=dict(type=LoraConfig, r=4, {KINDS['token indices']}),",
    )
    config.write_text(text, "utf-8")
    with pytest.raises(UserError, match="all embeddings are trained") as refused:
        BUILDER.build(load_config(str(config)).model)
    assert "trainable_token_indices" in refused.value.hint
    for wrong in ("[3, 512]", "{'embed_tokens': [-1]}"):
        plain = text.replace(str(tokenizers / "grown"), str(tiny_llama))
        config.write_text(plain.replace("[3, 7, 11]", wrong), "utf-8")
        with pytest.raises(UserError, match="the embedding has 512 rows"):
            BUILDER.build(load_config(str(config)).model)


def trained(config, checkpoint, ids):
    """A model after three steps, whose checkpoint is written."""
    torch.manual_seed(0)
    model = BUILDER.build(load_config(str(config)).model)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(batch)["loss"].backward()
        optimizer.step()
    torch.save({"state_dict": model.state_dict(), "meta": {"iter": 3}}, checkpoint)
    return model.eval()


@torch.no_grad()
def logits(model, ids):
    return model.eval()(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("tied", [True, slow(False)], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("kind", "grown"),
    [
        *((kind, True) for kind in ("full", "default targets", "saved", "saved head")),
        *((kind, False) for kind in ("saved head", "token indices")),
    ],
)
def test_all_compute_the_same(kind, grown, tied, tokenizers, tmp_path, capsys):
    base = save_tiny(tmp_path / "base", tie_word_embeddings=tied)
    tokenizer = tokenizers / ("grown" if grown else "same")
    lora = KINDS[kind]
    text = textwrap.dedent(CONFIG).format(
        tokenizer=str(tokenizer),
        base=str(base),
        lora="" if lora is None else f"lora=dict(type=LoraConfig, r=4, {lora}),",
    )
    config, checkpoint = tmp_path / "my.py", tmp_path / "iter_3.pth"
    config.write_text(text, "utf-8")
    ids = torch.arange(5, 25)[None]
    if grown:
        new = AutoTokenizer.from_pretrained(tokenizer).encode("<new_0><new_40><new_80><new_87>")
        ids[0, 5:9] = torch.tensor(new)
    expected = logits(trained(config, checkpoint, ids).llm, ids)
    hf, out = tmp_path / "hf", tmp_path / "out"
    assert main(["convert", "pth_to_hf", str(config), str(checkpoint), str(hf)]) == 0
    said = capsys.readouterr().out
    assert "verified" in said
    told = f"base.resize_token_embeddings({expected.shape[-1]})"  # what stock peft needs
    assert (told in said) == (grown and lora is not None)
    if lora is None:
        merged, ours = hf, load_for_chat(hf, dtype="fp32")[0]
    else:
        merged, ours = out, load_for_chat(base, hf, dtype="fp32")[0]
        assert main(["convert", "merge", str(base), str(hf), str(out), "--device", "cpu"]) == 0
        assert "verified" in capsys.readouterr().out
    torch.testing.assert_close(logits(ours, ids), expected, rtol=1e-3, atol=1e-4)
    stock = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    torch.testing.assert_close(logits(stock, ids), expected, rtol=1e-3, atol=1e-4)
    written = Weights(merged).infos
    assert written["model.embed_tokens.weight"].shape[0] == expected.shape[-1]
    is_tied = json.loads((merged / "config.json").read_text())["tie_word_embeddings"]
    assert is_tied == ("lm_head.weight" not in written)
