"""Models on the Hugging Face hub: cached, can be downloaded, or neither; known in seconds."""

from __future__ import annotations

import http.client
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

TIMEOUT = 3.0
"""Seconds to wait for the hub's answer; a download itself may take longer."""
INDEX_SUFFIX = ".index.json"
LONGEST_ANSWER = 5.0
"""Seconds that ``ask_hub`` waits, the look-up of the name included."""


def ask_hub() -> Callable[[], str | None]:
    """Ask the hub (or the mirror of ``HF_ENDPOINT``) for its front page, in the background.

    Nothing is asked with ``HF_HUB_OFFLINE``.

    Returns:
        A function that waits for the answer and gives None where there is one, else why not.
    """
    from huggingface_hub import constants

    errors: list[str | None] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
            urllib.request.urlopen(request, timeout=LONGEST_ANSWER).close()
        except urllib.error.HTTPError:
            errors.append(None)  # it answers
        except (OSError, ValueError, http.client.HTTPException) as error:
            errors.append(str(getattr(error, "reason", error)))
        else:
            errors.append(None)

    if constants.HF_HUB_OFFLINE:
        return lambda: None
    thread = threading.Thread(target=ask, daemon=True)  # a look-up of a name has no timeout
    thread.start()

    def answer() -> str | None:
        thread.join(LONGEST_ANSWER)
        if errors:
            return errors[0]
        return tr("no answer in {seconds:g} seconds", seconds=LONGEST_ANSWER)

    return answer


class ModelUnavailableError(UserError):
    """A model or tokenizer is neither on this machine nor can be downloaded."""


def require_available(name: str, where: Where | None = None) -> None:
    """Check that a model can be loaded, before anything takes long.

    Args:
        name: a folder, or a name on the hub.
        where: the place in a config that names it.

    Raises:
        ModelUnavailableError: when it looks like a folder that does not exist, or is a name on the
            hub that is neither in the local cache nor can be downloaded.
        UserError: for a folder whose index of weights cannot be used.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        for index in folder.glob(f"*{INDEX_SUFFIX}"):
            read_weight_map(index)
        return
    if _looks_like_a_path(name):
        raise ModelUnavailableError(
            tr("the model folder {name} does not exist.", name=name),
            hint=tr("give the path of a Hugging Face model folder, or a name on the hub."),
            where=where,
        )
    if not _is_cached(name):
        _require_on_hub(name, where)


def read_weight_map(index: Path) -> dict[str, str]:
    """Read which file of a model folder holds which tensor.

    Args:
        index: ``model.safetensors.index.json``, or that of ``.bin`` files.

    Returns:
        Name of the tensor -> name of the file.

    Raises:
        UserError: when it is damaged, or names files outside its folder.
    """
    try:
        names = dict(json.loads(index.read_text("utf-8"))["weight_map"])
        for name in names.values():
            path = Path(name)
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(tr("{name!r} is not in this folder", name=name))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            tr("this index of weights cannot be used: {error}", error=error),
            hint=tr("download or convert the model again."),
            where=Where(str(index)),
        ) from error
    return names


def model_file(name: str, file: str) -> Path | None:
    """A file of a model on this machine; nothing is downloaded.

    Args:
        name: a folder, or a name on the hub.
        file: its name in the model's folder.

    Returns:
        Its path in the folder or in the hub's cache; None where it is not here.
    """
    local = Path(name).expanduser() / file
    if local.is_file() or _looks_like_a_path(name):
        return local if local.is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, file)
    except HFValidationError:  # no name of the hub looks like this
        return None
    return Path(cached) if isinstance(cached, str) else None


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).is_file()


def _is_cached(name: str) -> bool:
    return any(model_file(name, file) for file in ("config.json", "tokenizer_config.json"))


def _require_on_hub(name: str, where: Where | None) -> None:
    """Ask the hub (or the mirror of ``HF_ENDPOINT``) for the model's config.json, without it."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        RepositoryNotFoundError,
    )
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        url = hf_hub_url(name, "config.json", endpoint=os.environ.get("HF_ENDPOINT") or None)
        get_hf_file_metadata(url, timeout=TIMEOUT)
    except (RepositoryNotFoundError, HFValidationError) as error:  # gated ones too
        raise ModelUnavailableError(
            tr("the Hugging Face hub has no model {name} that you may read.", name=name),
            hint=tr("check the name; for a private or gated model log in with 'hf auth login'."),
            where=where,
        ) from error
    except HfHubHTTPError:
        return  # the hub answers: whatever else is wrong, loading says it
    except (HTTPError, OSError) as error:  # no network, or HF_HUB_OFFLINE
        raise ModelUnavailableError(
            tr(
                "the model {name} is not on this machine, and the Hugging Face hub cannot be "
                "reached.",
                name=name,
            ),
            hint=tr(
                "fetch it elsewhere and give its folder (in a config --cfg-options "
                "model.pretrained=/PATH); or set HF_ENDPOINT to a mirror."
            ),
            where=where,
        ) from error
