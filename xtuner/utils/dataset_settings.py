"""Settings of datasets that no data can make right: refused by all before any are read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypeGuard

from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

TRAIN_THINKING = ("keep", "mask_empty", "drop")
"""Train blocks as they are; empty ones without loss; no reasoning, and no loss on empty ones."""
BAD_IMAGES = ("drop", "error")
_OF_IMAGES = {"bad_images": BAD_IMAGES}
PARTS = ("train", "val")
_OF_TEXTS: Mapping[str, Sequence[str]] = {
    "long_samples": ("cut", "split", "drop", "error"),
    "train_on": ("answers", "last_answer", "everything"),
    "bad_rows": ("error", "drop"),
    "train_thinking": TRAIN_THINKING,
    "part": PARTS,
}
CHOICES: Mapping[str, Mapping[str, Sequence[str]]] = {
    "process_hf_dataset": _OF_TEXTS,
    "process_ms_dataset": _OF_TEXTS,
    "VisionLanguageDataset": {**_OF_TEXTS, "long_samples": ("drop", "error", "shrink")},
    "VisionLanguagePreferenceDataset": {**_OF_TEXTS, "long_samples": ("drop", "error")},
    "LLaVADataset": _OF_IMAGES,
    "InternVL_V1_5_Dataset": _OF_IMAGES,
    "RefCOCOJsonDataset": _OF_IMAGES,
    "InvRefCOCOJsonDataset": _OF_IMAGES,
    "build_preference_dataset": {},
}
"""The settings of each builder that take one of some texts."""
_WITH_FILES = [name for name, choices in CHOICES.items() if choices is _OF_IMAGES]
"""Builders that read the files themselves."""
_SOURCE = "dataset=dict(type=load_dataset, path='json', data_files=dict(train=data_path))"
_WHOLE = (
    "max_length",
    "max_dataset_length",
    "max_pixels",
    "max_packed_length",
    "map_num_proc",
    "num_proc",
)
"""Settings that are a whole number above 0, where they are given."""


@dataclass(frozen=True)
class WrongSetting:
    """A setting that the builder refuses."""

    key: str
    message: str
    hint: str | None = None


def require_settings(builder: str, settings: Mapping[str, Any]) -> None:
    """Refuse settings that cannot be right.

    Args:
        builder: of the dataset, one of ``CHOICES``.
        settings: those that it has, with the default values or without.

    Raises:
        UserError: for the first one.
    """
    for wrong in wrong_settings(builder, settings):
        raise UserError(wrong.message, hint=wrong.hint, where=Where(key=wrong.key))


def wrong_settings(builder: str, settings: Mapping[str, Any]) -> Iterator[WrongSetting]:
    """What a builder refuses of its settings, whatever the data are.

    Args:
        builder: of the dataset, one of ``CHOICES``.
        settings: those that are given; others have the builder's default values.
    """
    for key, choices in CHOICES[builder].items():
        if key in settings and settings[key] not in choices:
            names = tr("one of {names}", names=", ".join(map(repr, choices)))
            yield WrongSetting(key, _expected(names, settings[key]))
    source = settings.get("dataset", {})
    if builder not in _WITH_FILES and (source is None or isinstance(source, str | int)):
        yield WrongSetting("dataset", _expected("dict(type=load_dataset, ...)", source), _SOURCE)
    for key in _WHOLE:
        value = settings.get(key)
        if value is not None and not (_is_whole(value) and value > 0):
            yield WrongSetting(key, _expected(tr("a whole number above 0"), value))
    if "seed" in settings and not _is_whole(settings["seed"]):
        yield WrongSetting("seed", _expected(tr("a whole number"), settings["seed"]))
    yield from _wrong_split(settings)
    yield from _wrong_videos(settings)
    if builder in ("process_hf_dataset", "process_ms_dataset"):
        yield from _wrong_texts(settings)
    elif builder == "build_preference_dataset":
        yield from _wrong_pairs(settings)
    elif builder == "VisionLanguagePreferenceDataset":
        yield from _wrong_pairs_with_images(settings)
    elif builder == "LLaVADataset":
        sources = ("data_path", "offline_processed_text_folder")
        if sum(settings.get(name) is not None for name in sources) != 1:
            yield WrongSetting("data_path", tr("give data_path or offline_processed_text_folder"))


def _expected(what: str, value: object) -> str:
    return tr("expected {what}, got {value!r}", what=what, value=value)


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _wrong_split(settings: Mapping[str, Any]) -> Iterator[WrongSetting]:
    size = settings.get("val_size", 0)
    is_size = isinstance(size, Real) and not isinstance(size, bool)
    is_size = is_size and 0 <= size < math.inf and (size < 1 or size == int(size))
    hint = tr("a share such as 0.02, or a number of rows.")
    if not is_size:
        message = _expected(tr("a share below 1, or a number of rows"), size)
        yield WrongSetting("val_size", message, hint)
    elif not size and settings.get("part") == "val":
        yield WrongSetting("val_size", tr("part='val' needs a val_size above 0"), hint)


def _wrong_videos(settings: Mapping[str, Any]) -> Iterator[WrongSetting]:
    frames, fps = settings.get("video_frames", 1), settings.get("video_fps")
    if not (_is_whole(frames) and frames > 0):
        yield WrongSetting("video_frames", _expected(tr("a whole number above 0"), frames))
    is_number = isinstance(fps, int | float) and not isinstance(fps, bool)
    if fps is not None and not (is_number and 0 < fps < math.inf):
        yield WrongSetting("video_fps", _expected(tr("a number above 0, or None"), fps))


def _wrong_texts(settings: Mapping[str, Any]) -> Iterator[WrongSetting]:
    packs = settings.get("pack_to_max_length", True)
    encodes = settings.get("do_dataset_tokenization", True)
    if packs and encodes and settings.get("max_length") is None:
        yield WrongSetting("max_length", tr("packing needs max_length"))
    renames = settings.get("rename_maps") or ()
    for pair in renames if isinstance(renames, list | tuple) else [renames]:
        is_pair = isinstance(pair, list | tuple) and len(pair) == 2
        if not is_pair and not (isinstance(pair, Mapping) and {"old", "new"} <= set(pair)):
            yield WrongSetting(
                "rename_maps",
                _expected("dict(old=..., new=...)", pair),
                "rename_maps=[dict(old='question', new='input')]",
            )


def _wrong_pairs_with_images(settings: Mapping[str, Any]) -> Iterator[WrongSetting]:
    yield from _wrong_reward_token(settings)
    if settings.get("pack_to_max_length"):
        yield WrongSetting(
            "pack_to_max_length",
            tr("pairs of answers are not packed when they are prepared."),
            tr(
                "set pack_to_max_length = False; with use_varlen_attn = True the pairs of a "
                "micro-batch share a row."
            ),
        )
    if "train_on" in settings:
        yield WrongSetting("train_on", tr("of pairs the last answer is trained: remove it"))


def _wrong_reward_token(settings: Mapping[str, Any]) -> Iterator[WrongSetting]:
    token = settings.get("reward_token_id", -1)
    if settings.get("is_reward") and not (_is_whole(token) and token >= 0):
        yield WrongSetting(
            "reward_token_id",
            tr("a reward model needs the id of the token at which its reward is read"),
        )


def _wrong_pairs(settings: Mapping[str, Any]) -> Iterator[WrongSetting]:
    is_reward = settings.get("is_reward", False)
    if settings.get("is_dpo", True) == is_reward:
        yield WrongSetting("is_reward", tr("set one of is_dpo and is_reward"))
    yield from _wrong_reward_token(settings)
    length, packed = settings.get("max_length"), settings.get("max_packed_length", 16384)
    if not (_is_whole(length) and _is_whole(packed)):
        return
    if settings.get("use_varlen_attn") and packed < 2 * length:
        yield WrongSetting(
            "max_packed_length",
            tr(
                "a row of {max_packed_length} tokens cannot hold a pair of two times {max_length}",
                max_packed_length=packed,
                max_length=length,
            ),
            "max_packed_length = max_length * 2",
        )
