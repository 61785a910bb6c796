"""Model and adapter folders: found by path or hub name, checked, and their small files."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtuner.utils.errors import UserError, Where
from xtuner.utils.files import restore_killed
from xtuner.utils.lang import tr

if TYPE_CHECKING:
    from peft import PeftConfig

ORIGINALS = ("*.model", "*.tiktoken", "vocab.*", "merges.txt")
VOCABULARIES = ("tokenizer.json", *ORIGINALS)
TOKENIZER_FILES = (
    *VOCABULARIES,
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)
PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
CODE = "tokenization_*.py"
_OUTPUTS = ("config.json", "adapter_config.json", "xtuner_config.py")


def find_model(name_or_path: str, marker: str = "config.json") -> Path:
    """The folder of a model: a local one, or that of a hub model, downloaded if necessary.

    Args:
        name_or_path: a folder, or a name of the Hugging Face hub such as ``internlm/internlm2-7b``.
        marker: the file that identifies it: ``config.json`` or ``adapter_config.json``.

    Raises:
        UserError: no such folder, not such a folder, or a hub name that cannot be fetched.
    """
    if not name_or_path:
        raise UserError(
            tr("the config makes this model itself: no folder is its base."),
            hint=tr("save it with save_pretrained, and load it in the config from there."),
            where=Where(key="model.llm"),
        )
    folder = Path(name_or_path).expanduser()
    if not folder.exists():
        restore_killed(folder)
    if folder.is_dir():
        if (folder / marker).is_file():
            read_json(folder / marker)  # or it is refused
            return folder
        raise UserError(
            tr("this folder has no {marker}.", marker=marker),
            hint=_marker_hint(folder, marker),
            where=Where(str(folder)),
        )
    if folder.is_file():
        raise UserError(
            tr("this is a file, not the folder of a model."),
            hint=_file_hint(folder, marker),
            where=Where(str(folder)),
        )
    looks_local = name_or_path.count("/") != 1 or name_or_path.startswith((".", "/", "~"))
    if looks_local or folder.exists() or folder.parent.is_dir():
        raise UserError(
            tr("there is no model folder {name_or_path!r}.", name_or_path=name_or_path),
            hint=tr(
                "give a folder that has the file {marker}, or a hub name like "
                "'internlm/internlm2-7b'.",
                marker=marker,
            ),
        )
    return _download(name_or_path)


def _marker_hint(folder: Path, marker: str) -> str:
    if marker == "config.json" and (folder / "adapter_config.json").is_file():
        return tr("it is an adapter: pass its base model here and this folder as the adapter.")
    if marker == "adapter_config.json" and (folder / "config.json").is_file():
        return tr("it is a full model, not an adapter: there is nothing to merge.")
    from xtuner.checkpoint.checkpoint import checkpoints_of

    checkpoint = checkpoint_around(folder) or next(iter(checkpoints_of(folder)), None)
    if checkpoint is not None:
        return convert_hint(checkpoint)
    return tr("'xtuner convert pth_to_hf' converts a training checkpoint into such a folder.")


def _file_hint(file: Path, marker: str) -> str:
    checkpoint = checkpoint_around(file)
    if checkpoint is not None:
        return convert_hint(checkpoint)
    if (file.parent / marker).is_file():
        return tr("give the folder: {folder}", folder=shlex.quote(str(file.parent)))
    return tr("'xtuner convert pth_to_hf' converts a training checkpoint into such a folder.")


def checkpoint_around(path: Path) -> Path | None:
    """The checkpoint of training that a path is, or that it is a part of."""
    from xtuner.checkpoint.deepspeed import is_deepspeed_folder
    from xtuner.checkpoint.folder import is_sharded_folder

    named = (each for each in (path, *path.parents) if each.suffix == ".pth")
    folder = path if path.is_dir() else path.parent
    is_folder = is_deepspeed_folder(folder) or is_sharded_folder(folder)
    return next(named, folder if is_folder else None)


def convert_hint(checkpoint: Path) -> str:
    """What to type to make a model's folder of a checkpoint."""
    words = ["xtuner", "convert", "pth_to_hf", str(checkpoint), "OUT"]
    return tr("convert the checkpoint: {command}", command=shlex.join(words))


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, ignore_patterns=["*.gguf", "*.onnx", "original/*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(
            tr(
                "{name!r} is no local folder, and it cannot be fetched from the Hugging Face hub.",
                name=name,
            ),
            hint=tr(
                "check the name and the network (HF_ENDPOINT sets a mirror), or download the model "
                "elsewhere and give the path of its folder."
            ),
        ) from error


def check_output(out: Path, inputs: list[Path]) -> None:
    """Refuse an output folder that is an input, or that holds something else than a model.

    A model that an earlier conversion wrote there is replaced, once the new one is complete.
    """
    for source in inputs:
        if source.exists() and out.exists() and source.resolve() == out.resolve():
            raise UserError(
                tr("the output folder is also an input."),
                hint=tr("choose another output folder."),
                where=Where(str(out)),
            )
    restore_killed(out)
    if out.is_file():
        raise UserError(
            tr("this is a file, not a folder to write to."),
            where=Where(str(out)),
        )
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not any((out / name).is_file() for name in _OUTPUTS):
        raise UserError(
            tr("this folder is not empty and does not hold a model; nothing is overwritten."),
            hint=tr("choose a new output folder."),
            where=Where(str(out)),
        )
    print(tr("{out} holds a model: it will be replaced.", out=out))


def copy_tokenizer(source: Path, target: Path) -> bool:
    """Replace the tokenizer and the stop tokens in ``target`` by those of ``source``, if any.

    So are the settings of a processor for images, where ``source`` has them.

    The vocabulary stays where ``source`` has none, and so does code that ``source`` has not. A
    tokenizer of the same class keeps the files that transformers 5 does not write any more beside
    ``tokenizer.json``.
    """
    if not any(source.glob("tokenizer*")):
        return False
    kept: tuple[str, ...] = () if matching(source, VOCABULARIES) else VOCABULARIES
    if _tokenizer_class(source) == _tokenizer_class(target):
        kept = kept or ORIGINALS
    for old in matching(target, TOKENIZER_FILES) - matching(target, kept):
        old.unlink()
    for file in matching(
        source, (*TOKENIZER_FILES, *PROCESSOR_FILES, CODE, "generation_config.json")
    ):
        shutil.copyfile(file, target / file.name)
    return True


def _tokenizer_class(folder: Path) -> str:
    name = read_json(folder / "tokenizer_config.json").get("tokenizer_class") or ""
    return str(name).removesuffix("Fast")


def matching(folder: Path, patterns: Iterable[str]) -> set[Path]:
    """The files of a folder whose names match one of the patterns."""
    return {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file's dict; ``{}`` when there is no such file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            tr("this is not JSON: {error}", error=error), where=Where(str(file))
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            tr("this holds {kind}; an object is expected.", kind=type(content).__name__),
            where=Where(str(file)),
        )
    return content


def read_adapter_config(adapter: Path) -> PeftConfig:
    """The config of an adapter's folder.

    Raises:
        UserError: when it cannot be used.
    """
    from peft import PeftConfig

    settings = read_json(adapter / "adapter_config.json")
    try:
        for name in ("target_modules", "exclude_modules"):
            if isinstance(settings.get(name), str):
                re.compile(settings[name])
        return PeftConfig.from_pretrained(str(adapter))
    except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
        raise UserError(
            tr("this adapter's config cannot be used: {why}", why=repr(error)),
            hint=tr("the file is damaged or of another format; get it again."),
            where=Where(str(adapter / "adapter_config.json")),
        ) from error


def update_json(file: Path, **changes: object) -> None:
    """Set keys of a JSON file; a value of None removes its key."""
    content = read_json(file)
    for key, value in changes.items():
        if value is None:
            content.pop(key, None)
        else:
            content[key] = value
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
