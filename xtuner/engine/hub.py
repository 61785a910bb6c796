"""Names on the Hugging Face hub: whether they are here or can be fetched, found out in seconds."""

from __future__ import annotations

import os
import socket
import urllib.parse
from pathlib import Path

from xtuner.utils.errors import UserError, Where
from xtuner.utils.lang import tr

TIMEOUT = 3.0
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def require_reachable(name: str, where: Where) -> None:
    """See that a model can be loaded, before anything takes long.

    Args:
        name: a folder, or a name on the hub.
        where: the place in the config that names it.

    Raises:
        UserError: when it looks like a folder and is none, or is a name on the hub that is
            neither in the local cache nor can be fetched.
    """
    if Path(name).is_dir():
        return
    if _looks_like_a_path(name):
        raise UserError(
            tr("the model folder {name} does not exist.", name=name),
            hint=tr("give the path of a Hugging Face model folder, or a name on the hub."),
            where=where,
        )
    if not _is_cached(name) and not _hub_answers():
        raise UserError(
            tr(
                "the model {name} is not on this machine, and the Hugging Face hub cannot be "
                "reached.",
                name=name,
            ),
            hint=tr(
                "fetch it elsewhere and give its folder: --cfg-options model.pretrained=/PATH; or "
                "set HF_ENDPOINT to a mirror."
            ),
            where=where,
        )


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).is_file()


def _is_cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def _hub_answers() -> bool:
    """Whether a connection to the hub can be made, within three seconds."""
    if any(os.environ.get(name, "").upper() in ("1", "TRUE", "ON", "YES") for name in OFFLINE):
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return True  # only the proxy can tell
    url = urllib.parse.urlparse(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    port = url.port or (80 if url.scheme == "http" else 443)
    try:
        socket.create_connection((url.hostname or "", port), TIMEOUT).close()
    except OSError:
        return False
    return True
