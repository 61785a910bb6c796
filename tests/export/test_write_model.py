"""Models that are written tensor by tensor: what is in the files, and what cannot be streamed."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from tests.helpers.tiny import make_model, save_tiny
from xtuner.export import write_model
from xtuner.export.trained_weights import TrainedWeights
from xtuner.export.weights import TensorInfo, Weights


class Trained(TrainedWeights):
    """Weights in memory, in place of a checkpoint's."""

    def __init__(self, tensors):
        self.tensors = tensors
        self.infos = {
            name: TensorInfo(name, tuple(value.shape), value.dtype)
            for name, value in tensors.items()
        }

    def read(self, name):
        return self.tensors[name]


def trained(llm, prefix="llm."):
    return Trained({f"{prefix}{name}": value for name, value in llm.state_dict().items()})


def write(llm, out, **settings):
    chosen = dict(dtype=None, shard_size=2**30, safe=True, progress=lambda nbytes: None)
    out.mkdir()
    write_model.write_full_model(llm, trained(llm), out, **(chosen | settings))


@pytest.fixture
def llm(tmp_path):
    folder = save_tiny(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.01)
    return model


def test_stock_transformers_reads_what_was_trained(llm, tmp_path):
    nbytes = []
    write(llm, tmp_path / "out", progress=nbytes.append)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, value in llm.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert sum(nbytes) == sum(value.nbytes for value in llm.state_dict().values())
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert loaded.config.use_cache


def test_another_dtype_is_in_files_and_config(llm, tmp_path):
    write(llm, tmp_path / "out", dtype=torch.float16)
    infos = Weights(tmp_path / "out").infos.values()
    assert {info.dtype for info in infos} == {torch.float16}
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert config.dtype is torch.float16


def test_shards_are_not_larger_than_asked_for(llm, tmp_path):
    write(llm, tmp_path / "out", shard_size=100_000)
    files = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 1
    sizes = [[tensor.nbytes for tensor in load_file(file).values()] for file in files]
    assert all(sum(own) <= 100_000 or len(own) == 1 for own in sizes)


def test_an_adapter_names_its_base(llm, tmp_path):
    name = llm.name_or_path
    adapted = get_peft_model(llm, LoraConfig(r=2, target_modules=["q_proj"]))
    weights = trained(adapted)
    out = tmp_path / "adapter"
    out.mkdir()
    write_model.write_adapter(adapted, weights, out, dtype=torch.float16, safe=True)
    tensors = load_file(out / "adapter_model.safetensors")
    assert len(tensors) == 4 and {value.dtype for value in tensors.values()} == {torch.float16}
    assert name in (out / "adapter_config.json").read_text()


def test_what_can_be_streamed():
    llm = make_model("llama")
    whole = nn.Module()
    whole.llm = llm
    weights = trained(llm)
    assert write_model.can_stream(whole, weights)
    whole.llm = get_peft_model(copy.deepcopy(llm), LoraConfig(r=2, target_modules=["q_proj"]))
    assert write_model.can_stream(whole, weights)
    # A projector beside the language model, and a model that transformers writes in another form.
    both = Trained(weights.tensors | {"projector.weight": torch.zeros(1)})
    whole.llm = llm
    assert not write_model.can_stream(whole, both)
    whole.llm = make_model("mixtral")
    assert not write_model.can_stream(whole, trained(whole.llm))
