"""The commands that serve a model folder, to be shown when one has been written."""

from __future__ import annotations

import shlex
from pathlib import Path

from xtuner.utils.lang import tr


def serving_commands(folder: Path) -> str:
    """Commands for xtuner, LMDeploy, vLLM, Ollama and OpenCompass, the folder's path filled in."""
    path = shlex.quote(str(folder.absolute()))
    name = shlex.quote(folder.absolute().name.lower())
    rows = [
        ("xtuner", f"xtuner chat {path}"),
        ("LMDeploy", f"lmdeploy chat {path}"),
        ("", f"lmdeploy serve api_server {path} --server-port 23333"),
        ("vLLM", f"vllm serve {path} --served-model-name {name}"),
        ("Ollama", f"(echo FROM {path} > Modelfile) && ollama create {name} -f Modelfile"),
        ("", f"ollama run {name}"),
        (
            "OpenCompass",
            f"opencompass --hf-type chat --hf-path {path} --datasets demo_gsm8k_chat_gen",
        ),
    ]
    lines = [tr("Use it:")]
    lines += [f"  {tool:<13}{command}" for tool, command in rows]
    return "\n".join(lines)
