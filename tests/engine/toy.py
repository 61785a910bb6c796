"""A small model, data and configs that keep the engine's contracts, for tests of the engine."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.dataset import DefaultSampler
from mmengine.model import BaseModel
from torch.utils.data import Dataset

from tests.helpers.tiny import make_model
from xtuner.engine.optim import FinetuneOptimWrapper
from xtuner.engine.runner import FinetuneRunner, TrainLoop, ValLoop

IGNORED = -100
VOCABULARY = 32


class ToyModel(BaseModel):
    """Predicts the label of each token from the token alone."""

    def __init__(
        self, width: int = 8, seed: int = 0, poison: int | None = None, llm: Any = None
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = torch.nn.Embedding(VOCABULARY, width)
        self.head = torch.nn.Linear(width, VOCABULARY)
        self.poison = poison
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)

    def num_items(self, data: dict[str, Any]) -> dict[str, int]:
        return {"tokens": int((data["labels"] != IGNORED).sum())}

    def forward(
        self,
        data: dict[str, Any],
        data_samples: None = None,
        mode: str = "loss",
        num_items_in_batch: dict[str, int] | None = None,
    ) -> dict[str, torch.Tensor]:
        num_items_in_batch = num_items_in_batch or self.num_items(data)
        logits = self.head(self.embedding(data["input_ids"]))
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(),
            data["labels"].flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        )
        if self.poison is not None and bool((data["input_ids"] == self.poison).any()):
            loss = loss * float("nan")
        return {"loss": loss / num_items_in_batch["tokens"]}


class ToyRows(Dataset):
    """Rows of random tokens; how many of a row are trained differs from row to row."""

    column_names = ["input_ids", "labels", "length"]

    def __init__(self, rows: int = 8, length: int = 6, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rows = []
        for number in range(rows):
            tokens = torch.randint(0, VOCABULARY - 1, (length,), generator=generator)
            labels = (tokens * 7 + 3) % VOCABULARY
            labels[: number % length] = IGNORED
            self.rows.append({"input_ids": tokens, "labels": labels, "row": f"toy.jsonl:{number}"})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Any) -> Any:
        if key == "length":
            return [len(row["input_ids"]) for row in self.rows]
        return self.rows[key]


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    data: dict[str, Any] = {
        name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")
    }
    data["rows"] = [row["row"] for row in rows]
    return {"data": data, "data_samples": None}


CONFIG = """
from mmengine.dataset import DefaultSampler
from mmengine.hooks import CheckpointHook, DistSamplerSeedHook, IterTimerHook
from mmengine.hooks import LoggerHook, ParamSchedulerHook
from mmengine.optim import AmpOptimWrapper, CosineAnnealingLR, LinearLR
from tests.engine.toy import ToyModel, ToyRows, collate
from torch.optim import AdamW
from xtuner.engine.runner import TrainLoop

batch_size = 1
accumulative_counts = 2
max_epochs = 1
lr = 0.01
save_steps = 500

model = dict(type=ToyModel)
train_dataloader = dict(
    batch_size=batch_size,
    num_workers=0,
    dataset=dict(type=ToyRows),
    sampler=dict(type=DefaultSampler, shuffle=True),
    collate_fn=dict(type=collate),
)
optim_wrapper = dict(
    type=AmpOptimWrapper,
    optimizer=dict(type=AdamW, lr=lr, betas=(0.9, 0.999), weight_decay=0),
    clip_grad=dict(max_norm=1, error_if_nonfinite=False),
    accumulative_counts=accumulative_counts,
    loss_scale="dynamic",
    dtype="float16",
)
param_scheduler = [
    dict(
        type=LinearLR,
        start_factor=1e-5,
        by_epoch=True,
        begin=0,
        end=0.03 * max_epochs,
        convert_to_iter_based=True,
    ),
    dict(
        type=CosineAnnealingLR,
        eta_min=0.0,
        by_epoch=True,
        begin=0.03 * max_epochs,
        end=max_epochs,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(type=TrainLoop, max_epochs=max_epochs)
custom_hooks = []
default_hooks = dict(
    timer=dict(type=IterTimerHook),
    logger=dict(type=LoggerHook, log_metric_by_epoch=False, interval=10),
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(type=CheckpointHook, by_epoch=False, interval=save_steps, max_keep_ckpts=2),
    sampler_seed=dict(type=DistSamplerSeedHook),
)
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)
visualizer = None
log_level = "INFO"
load_from = None
resume = False
randomness = dict(seed=0, deterministic=False)
log_processor = dict(by_epoch=False)
"""


def write_config(folder: Path, extra: str = "") -> Path:
    """Write the config, with further lines at its end, and return its path."""
    path = folder / "toy_config.py"
    path.write_text(CONFIG + extra, "utf-8")
    return path


class Frozen(ToyModel):
    """Nothing of it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


def leave_a_note(path: str, text: str) -> None:
    Path(path).write_text(text)


def make_runner(
    folder: Path,
    *,
    batch_size: int = 1,
    accumulative_counts: int = 1,
    rows: int = 8,
    poison: int | None = None,
    hooks: list | None = None,
    shuffle: bool = False,
    validate: bool = False,
    launcher: str = "none",
    optimizer: type = torch.optim.SGD,
    lr: float = 0.1,
    schedule: list | None = None,
    **loop,
) -> FinetuneRunner:
    loader = dict(
        batch_size=batch_size,
        num_workers=0,
        dataset=dict(type=ToyRows, rows=rows),
        sampler=dict(type=DefaultSampler, shuffle=shuffle),
        collate_fn=collate,
    )
    validation = dict(val_dataloader=dict(loader), val_cfg=dict(type=ValLoop), val_evaluator=[])
    return FinetuneRunner(
        model=dict(type=ToyModel, poison=poison),
        work_dir=str(folder),
        train_dataloader=loader,
        train_cfg=dict(type=TrainLoop, **(loop or dict(max_epochs=1))),
        optim_wrapper=dict(
            type=FinetuneOptimWrapper,
            optimizer=dict(type=optimizer, lr=lr),
            accumulative_counts=accumulative_counts,
        ),
        param_scheduler=schedule,
        default_hooks=dict(checkpoint=None, logger=None),
        custom_hooks=hooks or [],
        randomness=dict(seed=0),
        launcher=launcher,
        env_cfg=dict(dist_cfg=dict(backend="gloo")),
        experiment_name=f"{folder.name}_{time.monotonic_ns()}",
        **(validation if validate else {}),
    )


def weights(runner: FinetuneRunner) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in runner.model.parameters()])


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class TinyChat(BaseModel):
    """A real language model that keeps the engine's contract."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.llm = make_model("llama")

    def num_items(self, data):
        return {"tokens": int((data["labels"] != IGNORED).sum())}

    def forward(self, data, data_samples=None, mode="loss", num_items_in_batch=None):
        logits = self.llm(input_ids=data["input_ids"]).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), data["labels"].flatten(), reduction="sum"
        )
        return {"loss": loss / num_items_in_batch["tokens"]}


def run_with(folder: Path, *hooks, **settings):
    runner = make_runner(folder, hooks=list(hooks), **settings)
    runner.model = TinyChat()
    runner.train()
    return runner
