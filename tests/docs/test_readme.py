"""The tables of the README: models and methods are the catalogue's, the memory is its formula's."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from scripts.models_page import models_of_kinds
from tests.docs.test_pages import PAGES, names_in, tables_of
from xtuner.configs.models import MODELS
from xtuner.configs.names import parse
from xtuner.configs.unknown import UnknownConfig

ROOT = Path(__file__).parents[2]
READMES = [ROOT / "README.md", ROOT / "README_zh-CN.md"]
RANK = 64  # of the catalogue's adapters
FULL, ADAPTED, FOUR_BITS = 16, 2, 0.516  # bytes of a parameter: trained, frozen in 16 bits, in nf4


@dataclass(frozen=True)
class Shape:
    """The matrices of a decoder: (inputs, outputs) of each linear layer, and the embeddings."""

    layers: int
    linears: tuple[tuple[int, int], ...]
    embeddings: int

    @property
    def linear(self) -> int:
        return self.layers * sum(rows * columns for rows, columns in self.linears)

    @property
    def adapter(self) -> int:
        return self.layers * sum(RANK * (rows + columns) for rows, columns in self.linears)

    def gigabytes(self, method: str) -> float:
        whole = self.linear + self.embeddings
        size = {
            "full": FULL * whole,
            "LoRA": ADAPTED * whole + FULL * self.adapter,
            "QLoRA": FOUR_BITS * self.linear + ADAPTED * self.embeddings + FULL * self.adapter,
        }
        return size[method] / 1e9


def decoder(width: int, layers: int, inner: int, values: int, words: int, fused: bool) -> Shape:
    """A Llama-like decoder, its head not tied; ``values`` is the width of the keys and values."""
    attention = [(width, width + 2 * values)]
    if not fused:
        attention = [(width, width), (width, values), (width, values)]
    mlp = [(width, inner), (width, inner), (inner, width)]
    return Shape(layers, (*attention, (width, width), *mlp), 2 * words * width)


# The shapes of config.json on the hub.
SHAPES = {
    "InternLM2.5 1.8B": decoder(2048, 24, 8192, 1024, 92544, fused=True),
    "Qwen2.5 7B": decoder(3584, 28, 18944, 512, 152064, fused=False),
    "Qwen2.5 14B": decoder(5120, 48, 13824, 1024, 152064, fused=False),
}
COLUMNS = ("full", "LoRA", "QLoRA")


def table(readme: Path, corner: str) -> list[list[str]]:
    """The rows, without the head, of the table whose head has a text."""
    return next(rows[1:] for rows in tables_of(readme) if corner in " ".join(rows[0]))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_address_is_left_open(page):
    assert not re.search(r"URL_OF|TODO|YOUR_", page.read_text("utf-8"))


@pytest.mark.parametrize("readme", READMES, ids=lambda readme: readme.name)
def test_memory(readme):
    rows = table(readme, "GB")
    assert [row[0] for row in rows] == list(SHAPES)
    for name, *cells in rows:
        assert cells == [f"{SHAPES[name].gigabytes(method):.1f}" for method in COLUMNS], name


def can(model: str, method: str) -> bool:
    try:
        parse(f"{model}_{method}_alpaca_e3" if "_" not in method else f"{model}_{method}")
    except UnknownConfig:
        return False
    return True


@pytest.mark.parametrize("readme", READMES, ids=lambda readme: readme.name)
def test_models_and_methods(readme):
    families = {kind.model_type: found for kind, found in models_of_kinds().items()}
    rows = table(readme, "DPO")
    methods = ("full", "lora", "qlora", "dpo_qlora", "orpo_qlora", "reward_qlora")
    told: list[str] = []
    for _, types, *cells in rows:
        kinds = re.findall(r"\w+", " ".join(names_in(types)))
        told += kinds
        for kind in kinds:
            models = [name for name in families[kind] if name in MODELS]
            found = [any(can(model, method) for model in models) for method in methods]
            said = [cell in ("yes", "是") for cell in cells[: len(methods)]]
            assert found == said, kind
    assert sorted(told) == sorted(set(families) - {"internvl_chat"})
