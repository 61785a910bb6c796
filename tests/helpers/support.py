"""What holds for an architecture: loading, training, exporting, each against the plain class.

Used by ``benchmarks/support.py``, which tries all architectures, and by tests, which try a few.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.helpers.architectures import VOCABULARY, make_config
from tests.parallel.workers import together
from xtuner.dataset.collate_fns import default_collate_fn
from xtuner.library_errors import translate
from xtuner.model.sft import SupervisedFinetune
from xtuner.model.transformers_models.auto import AutoModelForCausalLM as Loader
from xtuner.parallel.sequence import init_sequence_parallel
from xtuner.proving.shrink import without_noise
from xtuner.proving.training import Trained, copy_trained, move_adapter, plain_training, train_on
from xtuner.tools.model_converters import merge, pth_to_hf

if TYPE_CHECKING:
    from tests.helpers.support_images import ImageText

LENGTHS = (7, 9, 5)
"""Tokens of the samples."""
EXACT = 1e-4
"""Largest relative difference of a loss or gradient in float32."""
ROUNDED = 0.05
"""Largest relative difference of a loss in bfloat16."""
EXPORTED = 1e-4
"""Largest difference of logits, relative to the largest logit, of a written folder."""
LARGEST = 40_000_000
"""Parameters of the largest model that is tried."""
ADAPTER = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
DROPOUT = 0.1
"""``lora_dropout`` of the catalogue's configs."""

Batch = dict[str, Any]
Row = dict[str, Tensor]


@dataclass(frozen=True)
class Cell:
    """What was found in one column: ``works``, ``refused``, ``wrong``, ``fails`` or ``untried``."""

    state: str
    reason: str = ""


class Wrong(Exception):
    """Something was computed, and is not what the plain class computes."""


class Found(Exception):
    """A cell that was found in another process."""

    def __init__(self, cell: Cell) -> None:
        super().__init__(cell.reason)
        self.cell = cell


class Untried(Exception):
    """This machine or library cannot try it."""


def require_same(found: Trained, wanted: Trained) -> None:
    """Raise ``Wrong`` where two trainings are not the same."""
    off = found.loss_difference(wanted)
    if not off <= EXACT:
        raise Wrong(f"loss off by {off:.1%}")
    missing = found.missing(wanted)
    if missing:
        raise Wrong(f"no gradient of {', '.join(missing[:3])}")
    off = found.gradient_difference(wanted)
    if not off <= EXACT:
        raise Wrong(f"gradients off by {off:.1%}")


class Architecture:
    """A tiny random model of an architecture, saved as the hub has it.

    Args:
        kind: a ``model_type`` of transformers.
        folder: where it is written.
        images: take the class for images and text.
    """

    def __init__(self, kind: str, folder: Path, *, images: bool = False) -> None:
        self.kind, self.folder, self.images = kind, folder, images
        self.built: Any = None

    @cached_property
    def with_images(self) -> ImageText:
        """A model of this kind that comes with a processor of images."""
        from tests.helpers.image_text import FAMILIES
        from tests.helpers.support_images import ImageText

        if not self.images or self.kind not in FAMILIES:
            raise Untried("there is no tiny processor of it")
        return ImageText(self.kind, self.folder / "images")

    @cached_property
    def auto(self) -> Any:
        """transformers' own Auto class."""
        return AutoModelForImageTextToText if self.images else AutoModelForCausalLM

    @cached_property
    def base(self) -> Path:
        """The folder of the saved model."""
        folder = self.folder / "base"
        try:
            self._save(folder)
        except Exception as error:  # of a class of transformers, before anything of ours is called
            first = one_line(error)
            raise Untried(f"there is no tiny model of it: {first}") from error
        return folder

    def _save(self, folder: Path) -> None:
        torch.manual_seed(0)
        config = without_noise(make_config(self.kind))
        text = config.get_text_config()
        text.is_decoder = True
        if hasattr(text, "attention_chunk_size"):
            text.attention_chunk_size = 2 * max(LENGTHS)  # longer samples are refused
        with torch.device("meta"):
            size = self.auto.from_config(config).num_parameters()
        if size > LARGEST:
            raise ValueError(f"{size / 1e6:.0f} million parameters")
        model = self.auto.from_config(config, dtype=torch.float32)
        if not self.images and type(model.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        for weight in model.parameters():  # zeros at the start would hide what depends on them
            if not weight.any():
                nn.init.normal_(weight, std=0.02)
        model.save_pretrained(folder)

    def plain(self, folder: Path | None = None) -> PreTrainedModel:
        """The class of transformers, without anything of XTuner's."""
        settings = {"dtype": torch.float32, "attn_implementation": "eager"}
        model = self.auto.from_pretrained(folder or self.base, **settings)
        model.eval()
        return model

    def model(self, *, packed: bool = False, lora: dict | None = None, **settings: Any) -> Any:
        """The product's model, as a config builds it."""
        llm = {
            "type": self.loader.from_pretrained,
            "pretrained_model_name_or_path": str(self.base),
            "dtype": torch.float32,
            **settings.pop("llm", {}),
        }
        defaults = {"use_activation_checkpointing": False, **settings}
        self.built = SupervisedFinetune(llm, lora=lora, use_varlen_attn=packed, **defaults).eval()
        return self.built

    @property
    def loader(self) -> Any:
        """The Auto class that a config names."""
        of_images = self.images and self.kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        return AutoModelForImageTextToText if of_images else Loader

    @cached_property
    def packed_rows(self) -> Cell:
        """What was found in the column ``packed``."""
        return try_column(train_packed, self)

    @property
    def packs(self) -> bool:
        """Whether its rows can be packed; the columns after ``packed`` take padded ones if not."""
        return self.packed_rows.state == "works"

    @cached_property
    def trains(self) -> Cell:
        """What was found in the column ``full``."""
        return try_column(train_alone, self)

    @property
    def wanted(self) -> Trained:
        """Each sample alone, by the plain class."""
        if isinstance(self._wanted, Untried):
            raise self._wanted
        return self._wanted

    @cached_property
    def _wanted(self) -> Trained | Untried:
        try:
            return plain_training(self.plain(), rows())
        except Untried as error:
            return error
        except Exception as error:
            return Untried(f"its class fails on text: {one_line(error)}")


def rows() -> list[Row]:
    """The samples."""
    random = torch.Generator().manual_seed(1)
    drawn = [torch.randint(16, VOCABULARY - 16, (n,), generator=random) for n in LENGTHS]
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


def collated(samples: Sequence[Row], *, packed: bool) -> Batch:
    """One batch of the samples."""
    data: Batch = default_collate_fn(samples, use_varlen_attn=packed)["data"]
    return data


def product_training(model: Any, *, packed: bool, alone: bool = False) -> Trained:
    """The same by the product, in one batch, or ``alone`` in a batch for each sample."""
    samples = rows()
    parts = [[row] for row in samples] if alone else [samples]
    return train_on(model, [collated(part, packed=packed) for part in parts])


def loads(architecture: Architecture) -> None:
    """The folder is loaded by the product, and one row has the class's own loss."""
    if architecture.trains.state == "works":  # which is more
        raise Found(architecture.trains)
    row = rows()[1]
    model = architecture.model()
    with torch.no_grad():
        loss = float(model(collated([row], packed=False), mode="loss")["loss"])
        plain = architecture.plain()
        logits = plain(input_ids=row["input_ids"][None], use_cache=False).logits[0]
        wanted = float(nn.functional.cross_entropy(logits[:-1].float(), row["labels"][1:]))
    require_same(Trained(loss), Trained(wanted))


def full(architecture: Architecture) -> None:
    """Rows one by one, all weights."""
    raise Found(architecture.trains)


def train_alone(architecture: Architecture) -> None:
    """What ``full`` is."""
    model = architecture.model()
    require_same(product_training(model, packed=False, alone=True), architecture.wanted)


def packed(architecture: Architecture) -> None:
    """Packed rows, all weights."""
    raise Found(architecture.packed_rows)


def train_packed(architecture: Architecture) -> None:
    """What ``packed`` is."""
    model = architecture.model(packed=True)
    require_same(product_training(model, packed=True), architecture.wanted)


def padded(architecture: Architecture) -> None:
    """Padded rows, all weights."""
    require_same(product_training(architecture.model(), packed=False), architecture.wanted)


def checkpointing(architecture: Architecture) -> None:
    """Activations recomputed."""
    packs = architecture.packs
    model = architecture.model(packed=packs, use_activation_checkpointing=True).train()
    require_same(product_training(model, packed=packs), architecture.wanted)


def adapter(**changes: Any) -> dict[str, Any]:
    """The ``lora`` of a config."""
    from peft import LoraConfig

    return {"type": LoraConfig, **ADAPTER, "lora_dropout": 0.0, **changes}


def lora(architecture: Architecture) -> None:
    """The default adapter; against peft on the plain class, sample by sample."""
    from peft import get_peft_model

    model = architecture.model(packed=architecture.packs, lora=adapter())
    move_adapter(model)
    plain: Any = architecture.plain()
    config = model.llm.peft_config["default"]
    reference = get_peft_model(plain, config).eval()
    copy_trained(model.llm, reference)
    found = product_training(model, packed=architecture.packs)
    require_same(found, plain_training(reference, rows()))
    require_reached(model)


def require_reached(model: nn.Module) -> None:
    """Raise ``Wrong`` for a trained weight without a gradient, or with one that is not finite."""
    for name, weight in model.named_parameters():
        if weight.requires_grad and weight.grad is None:
            raise Wrong(f"no gradient of {name}")
        if weight.requires_grad and not weight.grad.isfinite().all():
            raise Wrong(f"the gradient of {name} is not finite")


def qlora(architecture: Architecture) -> None:
    """An adapter on a base in 4 bits; against the same model, sample by sample."""
    try:
        from transformers import BitsAndBytesConfig
    except ImportError as error:
        raise Untried(str(error)) from error
    bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    packs = architecture.packs
    model = architecture.model(packed=packs, lora=adapter(), llm={"quantization_config": bits})
    move_adapter(model)
    alone = product_training(model, packed=packs, alone=True)
    if not math.isfinite(alone.loss):
        raise Wrong(f"loss {alone.loss}")
    require_same(product_training(model, packed=packs), alone)
    require_reached(model)


def autocast(architecture: Architecture) -> None:
    """bf16 with the recipe of the catalogue: adapter with dropout, activations recomputed."""
    packs, recipe = architecture.packs, adapter(lora_dropout=DROPOUT)
    model = architecture.model(packed=packs, lora=recipe, use_activation_checkpointing=True)
    batch = collated(rows(), packed=packs)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            loss = float(model(batch, mode="loss")["loss"])
        off = abs(loss / architecture.wanted.loss - 1)
        if not off <= ROUNDED:
            raise Wrong(f"loss off by {off:.1%}")
        model.train()
        share = model(batch, mode="loss")["loss"]
    share.backward()
    require_reached(model)


def shared(architecture: Architecture) -> None:
    """Rows that two processes share."""
    wanted, _ = architecture.wanted, architecture.packs  # once, before the processes are forked
    found = together(_share, 2, architecture)
    cells = [Cell(**each["cell"]) for each in found if each["cell"]["state"] != "works"]
    if cells:  # a process whose partner refuses fails
        raise Found(min(cells, key=lambda cell: cell.state != "refused"))
    for name, weight in found[1]["gradients"].items():
        own = found[0]["gradients"]
        own[name] = own[name] + weight if name in own else weight
    summed = Trained(sum(each["loss"] for each in found), found[0]["gradients"])
    require_same(summed, wanted)


def _share(architecture: Architecture) -> dict[str, Any]:
    init_sequence_parallel(2)
    found = Trained(0.0)

    def train(architecture: Architecture) -> None:
        nonlocal found
        packs = architecture.packs
        found = product_training(architecture.model(packed=packs), packed=packs)

    cell = try_column(train, architecture)
    return {"cell": asdict(cell), "loss": found.loss, "gradients": found.gradients}


CONFIG = """
from peft import LoraConfig
from transformers import {auto}

from xtuner.model import SupervisedFinetune

model = dict(
    type=SupervisedFinetune,
    llm=dict(
        type={auto}.from_pretrained,
        pretrained_model_name_or_path={base!r},
        dtype="float32",
    ),{lora}
)
"""


def export(architecture: Architecture) -> None:
    """A checkpoint of full training, converted: stock transformers computes the same logits."""
    if architecture.trains.state != "works":
        raise Found(architecture.trains)
    model = architecture.model()
    move_weights(model)
    written = converted(architecture, model, "full", "")
    same_logits(architecture.plain(written), model)


def merged(architecture: Architecture) -> None:
    """An adapter's checkpoint, converted and merged: stock transformers computes the same."""
    if architecture.trains.state != "works":
        raise Found(architecture.trains)
    model = architecture.model(lora=adapter())
    move_adapter(model)
    text = "\n    lora=dict(type=LoraConfig, r=4, lora_alpha=8, task_type='CAUSAL_LM'),"
    written = converted(architecture, model, "adapter", text)
    out = architecture.folder / "merged"
    command(merge, str(architecture.base), str(written), str(out), "--no-verify")
    same_logits(architecture.plain(out), model)


def images_packed(architecture: Architecture) -> None:
    """Packed rows of text and images, all weights."""
    tiny = architecture.with_images
    require_same(tiny.training(packed=True), tiny.wanted)


def images_padded(architecture: Architecture) -> None:
    """Padded rows of text and images, all weights."""
    tiny = architecture.with_images
    require_same(tiny.training(packed=False), tiny.wanted)


def move_weights(model: nn.Module) -> None:
    """Change each weight a little, as training does."""
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=random) * 0.01)


def converted(architecture: Architecture, model: Any, name: str, lora: str) -> Path:
    """Save a model as training does, and convert it."""
    config = architecture.folder / f"{name}.py"
    auto = architecture.loader.__name__
    settings = CONFIG.format(auto=auto, base=str(architecture.base), lora=lora)
    config.write_text(settings, "utf-8")
    checkpoint = architecture.folder / f"{name}.pth"
    torch.save({"state_dict": model.state_dict()}, checkpoint)
    out = architecture.folder / name
    command(pth_to_hf, str(config), str(checkpoint), str(out), "--no-verify")
    return out


def command(module: Any, *words: str) -> None:
    """Run a command of the command line in this process."""
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    with contextlib.redirect_stdout(io.StringIO()):
        module.run(parser.parse_args(words))


@torch.no_grad()
def same_logits(found: Any, wanted: Any) -> None:
    """Raise ``Wrong`` where a written folder has other logits than the trained model."""
    row = rows()[1]
    batch = collated([row], packed=False)
    with torch.no_grad():
        wanted(batch, mode="loss")  # as trained: the first batch decides how rows are computed
    logits = wanted(batch, mode="tensor").logits
    written = found(input_ids=row["input_ids"][None], use_cache=False).logits
    off = float((written - logits).abs().max() / logits.abs().max())
    if not off <= EXPORTED:
        raise Wrong(f"logits off by {off:.1%} of the largest one")


COLUMNS: dict[str, Callable[[Architecture], None]] = {
    "loads": loads,
    "full": full,
    "packed": packed,
    "padded": padded,
    "checkpointing": checkpointing,
    "lora": lora,
    "qlora": qlora,
    "autocast": autocast,
    "shared": shared,
    "export": export,
    "merged": merged,
    "images_packed": images_packed,
    "images_padded": images_padded,
}
"""What is tried, by its name in results and pages."""


def try_column(column: Callable[[Architecture], None], architecture: Architecture) -> Cell:
    """Try one column; whatever goes wrong is what was found."""
    try:
        if column not in (images_packed, images_padded):  # which have models of their own
            architecture.wanted  # noqa: B018  what the plain class cannot compute is not tried
        column(architecture)
    except Untried as error:
        return Cell("untried", str(error))
    except Wrong as error:
        return Cell("wrong", str(error))
    except Found as error:
        return error.cell
    except Exception as error:  # what a class of transformers fails with is the finding
        refusal = translate(error)
        if refusal is not None:
            return Cell("refused", str(refusal).partition("\n")[0])
        return Cell("fails", one_line(error))
    if architecture.built is None:
        return Cell("works")
    llm = architecture.built.causal_lm
    own = llm._supports_attention_backend and llm.config._attn_implementation == "eager"
    return Cell("works", "with its own attention" if own else "")


def one_line(error: Exception) -> str:
    """An error's class and first line."""
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}"[:200]


@contextlib.contextmanager
def tiny(kind: str, *, images: bool = False) -> Iterator[Architecture]:
    """A tiny model of an architecture in a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        yield Architecture(kind, Path(folder), images=images)
