"""Signatures read from source agree with those that importing gives."""

import importlib
import inspect

import pytest
from mmengine.config.lazy import LazyAttr, LazyObject

from xtuner.config.names import NotThere, find, module_exists
from xtuner.config.signatures import missing, parameters_of

CALLABLES = [
    ("torch.optim", "AdamW"),
    ("torch.utils.data", "BatchSampler"),
    ("mmengine.dataset", "DefaultSampler"),
    ("mmengine.hooks", "LoggerHook"),
    ("mmengine.hooks", "CheckpointHook"),
    ("mmengine.runner", "IterBasedTrainLoop"),
    ("peft", "LoraConfig"),
    ("datasets", "load_dataset"),
    ("transformers", "TrainingArguments"),
    ("transformers", "BitsAndBytesConfig"),
    ("transformers", "Trainer"),
]


@pytest.mark.parametrize(("module", "name"), CALLABLES)
def test_same_as_imported(module, name):
    read = parameters_of(LazyObject(module, name))
    assert read is not None
    real = inspect.signature(getattr(importlib.import_module(module), name)).parameters.values()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for parameter in real:
        if parameter.kind in named:
            assert read.takes(parameter.name), parameter.name
            assert (parameter.name in read.required) == (parameter.default is parameter.empty)
    if not read.any_keyword:
        assert set(read.names) <= {parameter.name for parameter in real}


def test_base_classes_are_joined():
    """The keyword arguments of CosineAnnealingLR go through *args, **kwargs to two bases."""
    read = parameters_of(LazyObject("mmengine.optim", "CosineAnnealingLR"))
    assert read is not None and not read.any_keyword
    assert {"eta_min", "T_max", "begin", "end", "by_epoch"} <= set(read.names)


def test_a_base_that_several_classes_share_comes_last():
    """``**kwargs`` of VisionLanguageModel go to DPO, not to FinetuneModel at once."""
    from xtuner import model

    for name in ("VisionLanguageDPO", "VisionLanguageORPO", "VisionLanguageFinetune", "DPO"):
        read = parameters_of(LazyObject("xtuner.model", name))
        assert read is not None and not read.any_keyword
        parameters = [
            set(inspect.signature(base.__init__).parameters)
            for base in getattr(model, name).__mro__
            if base.__module__.startswith("xtuner") and "__init__" in vars(base)
        ]
        expected = set().union(*parameters) - {"self", "args", "kwargs"}
        assert set(read.names) == expected, name


def test_methods():
    read = parameters_of(LazyAttr("from_pretrained", LazyObject("transformers", "AutoTokenizer")))
    assert read is not None and read.required == ("pretrained_model_name_or_path",)
    assert read.any_keyword


@pytest.mark.parametrize(
    ("kind", "there"),
    [
        (LazyObject("torch.optim", "AdamW"), True),
        (LazyObject("torch.optim", "Adamw"), False),
        (LazyObject("torch.no_such"), False),
        (LazyObject("no_such_package", "x"), False),
        (LazyAttr("bfloat16", LazyObject("torch")), True),
        (LazyAttr("bfloat61", LazyObject("torch")), False),
        (LazyAttr("from_pretrained", LazyObject("transformers", "AutoModel")), True),
        (LazyAttr("from_pretraind", LazyObject("transformers", "AutoModel")), False),
        (LazyObject("transformers", "LlamaTokenizerFast"), True),
        (LazyObject("os.path", "join"), True),
        (LazyObject("xtuner.utils", "PROMPT_TEMPLATE"), True),
        (LazyObject("xtuner.utils", "PROMPT_TEMPLATES"), False),
    ],
)
def test_missing(kind, there):
    assert (missing(kind) is None) == there


def test_not_there_says_what():
    with pytest.raises(NotThere) as error:
        find("torch.optim", "Adamw")
    assert (error.value.module, error.value.name) == ("torch.optim", "Adamw")
    assert module_exists("torch.optim") and not module_exists("torch.optimal")
