"""Types that several packages share: a batch, and the parts of library objects that we rely on.

Imports nothing at run time. Concrete classes are better where a package may import them: use
``transformers.PreTrainedModel``, ``torch.distributed.ProcessGroup`` or ``FinetuneRunner`` under
``TYPE_CHECKING`` there, and these protocols below them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypedDict

if TYPE_CHECKING:
    import logging
    import os
    from contextlib import AbstractContextManager

    import torch
    from mmengine import Config, MessageHub
    from torch import Tensor, nn
    from torch.utils.data import DataLoader

Row: TypeAlias = Mapping[str, Any]
"""One row of a dataset: column names and values."""

MapFunction: TypeAlias = Callable[..., Mapping[str, Any] | None]
"""A dataset map function: a row in, a row out."""


RowFunction: TypeAlias = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""A map function as it is called: always a row out."""


@dataclass(frozen=True)
class ImagePlaces:
    """Where the image tokens of a batch are, in numbers that the CPU has.

    Attributes:
        rows: the real tokens of each row.
        places: the image tokens among the real tokens of each row.
        cu_seqlens: boundaries of the samples of a packed row; None of other rows.
    """

    rows: list[slice]
    places: list[list[int]]
    cu_seqlens: list[int] | None


class Batch(TypedDict, total=False):
    """What a collate function makes and a model is called with; tensors on one device.

    B rows of S tokens. Packed batches have B = 1 and ``cumulative_len`` in place of
    ``attention_mask``.
    """

    input_ids: Tensor  # (B, S) int64
    inputs_embeds: Tensor  # (B, S, H), in place of input_ids once images are merged
    labels: Tensor  # (B, S) int64, IGNORE_INDEX where not trained
    attention_mask: Tensor  # (B, S), 1 for tokens, 0 for padding
    position_ids: Tensor  # (B, S); restarts at each sample of a packed row
    cumulative_len: list[Tensor]  # one (samples + 1,) int32: cu_seqlens of the packed row
    max_seqlen: int  # tokens of the longest sample
    sample_mask: Tensor  # (1, S) of a packed row, ones, where its boundaries are known to attention
    supervised: Tensor  # (2, N) positions in the flattened rows, and the tokens predicted there
    rewarded: list[Tensor]  # positions in the flattened rows of chosen and of rejected answers
    pixel_values: Tensor  # (N, 3, H, W), images of all rows in order
    image_places: ImagePlaces  # of LLaVA's image tokens, found before the batch is on a GPU
    images: Mapping[str, Any]  # of the class's image processor, for all images in order
    images_per_sample: list[int]  # images of each row, or of each sample of a packed row
    mm_token_type_ids: Tensor  # (B, S) int64: 0 text, 1 image, 2 video
    rows: list[int]  # provenance: row numbers in the source
    parts: list[int]  # provenance: which of several joined datasets


class Tokenizer(Protocol):
    """What we use of ``transformers.PreTrainedTokenizerBase``."""

    bos_token: str | None
    bos_token_id: int | None
    eos_token: str | None
    eos_token_id: int | None
    pad_token: str | None
    pad_token_id: int | None
    unk_token_id: int | None
    chat_template: str | dict[str, str] | None
    is_fast: bool
    name_or_path: str
    padding_side: str
    all_special_ids: list[int]
    all_special_tokens: list[str]
    special_tokens_map: dict[str, str]
    vocab_size: int

    def __call__(self, text: str, **settings: object) -> Any: ...

    def __len__(self) -> int: ...

    def encode(self, text: str, **settings: object) -> list[int]: ...

    def tokenize(self, text: str) -> list[str]: ...

    def decode(self, token_ids: object, **settings: object) -> str: ...

    def batch_decode(self, sequences: object, **settings: object) -> list[str]: ...

    def apply_chat_template(self, conversation: object, **settings: object) -> Any: ...

    def convert_tokens_to_ids(self, tokens: object) -> Any: ...

    def convert_ids_to_tokens(self, ids: object, **settings: object) -> Any: ...

    def get_vocab(self) -> dict[str, int]: ...

    def get_added_vocab(self) -> dict[str, int]: ...

    def add_tokens(self, new_tokens: object, **settings: object) -> int: ...

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], **settings: object
    ) -> Any: ...


class ImageProcessor(Protocol):
    """What we use of ``transformers.BaseImageProcessor``."""

    size: Mapping[str, int]
    crop_size: Mapping[str, int]
    image_mean: Sequence[float]
    image_std: Sequence[float]

    def preprocess(self, images: object, **settings: object) -> Mapping[str, Any]: ...

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], **settings: object
    ) -> Any: ...


class AutogradContext(Protocol):
    """``ctx`` of a ``torch.autograd.Function``: any attribute may be set on it."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...

    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...

    def mark_dirty(self, *tensors: Tensor) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...

    def __getattr__(self, name: str) -> Any: ...

    def __setattr__(self, name: str, value: object) -> None: ...


class Runner(Protocol):
    """What hooks, checkpoints and reports use of ``engine.runner.FinetuneRunner``."""

    cfg: Config
    model: nn.Module
    logger: logging.Logger
    message_hub: MessageHub
    device: torch.device
    optim_wrapper: Any
    param_schedulers: Any
    strategy: Any
    fingerprints: dict[str, str]
    initial_groups: Sequence[Mapping[str, Any]]
    readiness: Sequence[str]
    saved_random_states: Sequence[Mapping[str, Any]] | None
    seed: int
    experiment_name: str
    world_size: int
    work_dir: str
    log_dir: str
    iter: int
    epoch: int
    max_iters: int

    @property
    def train_loop(self) -> Any: ...

    @property
    def train_dataloader(self) -> DataLoader[Any]: ...

    @property
    def hooks(self) -> Iterable[object]: ...

    def autocast(self) -> AbstractContextManager[Any]: ...

    def trace(self, batch: Mapping[str, Any]) -> list[str]: ...

    def call_hook(self, fn_name: str, **kwargs: object) -> None: ...

    def save_checkpoint(self, out_dir: str, filename: str, **settings: object) -> None: ...
