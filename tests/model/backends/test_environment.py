"""What is installed, as modules of our own with the real signatures tell it, and what is chosen."""

import logging
import sys
from types import ModuleType

import pytest
import torch

from tests.model.backends.gpu import test_attention as stand_ins
from xtuner.model.backends import environment
from xtuner.model.backends.case import Case
from xtuner.model.backends.registry import choose
from xtuner.model.modules.attention import PACKED_BACKENDS

MODULES = {
    2: ("flash_attn", stand_ins.flash_attn),
    3: ("flash_attn_interface", stand_ins.flash_attn_3),
    4: ("flash_attn.cute", stand_ins.flash_attn_4),
}
T4, A100, H100, BLACKWELL = (7, 5), (8, 0), (9, 0), (12, 0)
BY_SAMPLE = "torch sdpa, sample by sample"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Make a machine: a GPU, some versions of flash-attn, of which some cannot be imported."""

    def make(capability, versions=(), broken=()):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.syspath_prepend(tmp_path)
        for number, (name, function) in MODULES.items():
            monkeypatch.delitem(sys.modules, name, raising=False)
            if number not in versions:
                continue
            module = ModuleType(name)
            module.__file__ = f"{name}.py"
            module.flash_attn_varlen_func = function
            if number == 4 and 2 not in versions:  # a namespace package around it
                package = ModuleType("flash_attn")
                package.__path__ = []
                monkeypatch.setitem(sys.modules, "flash_attn", package)
            monkeypatch.setitem(sys.modules, name, module)
        for number in broken:
            name = MODULES[number][0]
            (tmp_path / f"{name}.py").write_text(
                "raise ImportError('undefined symbol: _ZN3c105ErrorC2Ev')\n"
            )
        forget()
        return environment.libraries()

    def forget():
        environment.libraries.cache_clear()
        environment.function.cache_clear()
        environment._warn_once.cache_clear()

    yield make
    forget()


def choice(capability, libraries, **facts):
    case = Case("cuda", capability, libraries=libraries, packed=True, **facts)
    return choose(PACKED_BACKENDS, case)


INSTALLED = [  # GPU, versions of flash-attn, broken ones -> the choice, for torch 2.11 or newer
    (H100, (), (), "torch varlen"),
    (H100, (2,), (), "flash-attn"),
    (H100, (2, 3), (), "flash-attn 3"),
    (H100, (4,), (), "flash-attn 4"),
    (H100, (), (2,), "torch varlen"),
    (H100, (2,), (3,), "flash-attn"),
    (A100, (4,), (), "torch varlen"),
    (A100, (2, 3, 4), (), "flash-attn"),
    (BLACKWELL, (2,), (), "flash-attn"),
    (BLACKWELL, (), (2, 3), "torch varlen"),
    (T4, (2, 3, 4), (), BY_SAMPLE),
]


@pytest.mark.parametrize("capability, versions, broken, name", INSTALLED)
def test_choice_by_what_is_installed(machine, capability, versions, broken, name):
    assert choice(capability, machine(capability, versions, broken)).name == name


def test_a_broken_library_is_named_once(machine, caplog):
    with caplog.at_level(logging.WARNING):
        libraries = machine(H100, broken=(2,))
        assert environment.libraries() is libraries
        assert "undefined symbol" in choice(H100, libraries).reason
    said = [record.getMessage() for record in caplog.records]
    assert len([text for text in said if "undefined symbol" in text]) == 1


def test_flash_attn_4_alone_is_no_broken_version_2(machine, caplog):
    with caplog.at_level(logging.WARNING):
        libraries = machine(H100, versions=(4,))
    assert libraries.flash_attn.error == "not installed"
    assert "softmax_scale" in libraries.flash_attn_4.keywords
    assert not caplog.records


def test_without_a_gpu_nothing_is_imported(machine, monkeypatch):
    machine(H100, broken=(2,))
    environment.libraries.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert environment.libraries().flash_attn.error == "not installed"


def test_torch_has_the_kernels(machine):
    """Their signatures are asked; flex attention is in each supported version."""
    libraries = machine(H100)
    assert not libraries.flex_attention.error
    assert "block_mask" in libraries.flex_attention.keywords
    if not libraries.varlen_attn.error:
        assert "cu_seq_q" in libraries.varlen_attn.keywords
