"""Web search through serper.dev."""

from __future__ import annotations

import json
import os
import urllib.request

from xtuner.utils.errors import UserError
from xtuner.utils.lang import tr

ADDRESS = "https://google.serper.dev/search"
RESULTS = 3
TIMEOUT = 10.0


def search(query: str) -> str:
    """The first few results of a search, one line each.

    Raises:
        UserError: without ``SERPER_API_KEY``, or when the service does not answer.
    """
    key = os.environ.get("SERPER_API_KEY")
    if not key:
        raise UserError(
            tr("the search needs a key."),
            hint=tr("get one at https://serper.dev and set SERPER_API_KEY."),
        )
    request = urllib.request.Request(
        ADDRESS,
        data=json.dumps({"q": query}).encode(),
        headers={"X-API-KEY": key, "Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            found = json.load(answer)
    except (OSError, ValueError) as error:
        raise UserError(tr("the search failed: {error}", error=error)) from error
    snippets = [entry.get("snippet", "") for entry in found.get("organic", [])[:RESULTS]]
    return "\n".join(f"<|{number}|>: {text}" for number, text in enumerate(snippets, 1))
