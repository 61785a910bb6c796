"""The commands that serve a model folder, to be shown when one has been written."""

from __future__ import annotations

import shlex
from pathlib import Path

from xtuner.export.model_folder import read_json
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


_ADAPTER_COMMANDS = {
    "vllm": "vllm serve {base} --enable-lora --lora-modules {name}={path} --max-lora-rank {rank}",
    "sglang": "python -m sglang.launch_server --model-path {base} --lora-paths {name}={path}",
    "lmdeploy": "lmdeploy serve api_server {base} --backend pytorch --adapters {name}={path}",
}
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def adapter_command(reader: str, base: str, folder: Path) -> str:
    """The command with which vLLM, SGLang or LMDeploy serves a base with an adapter.

    Args:
        reader: ``vllm``, ``sglang`` or ``lmdeploy``.
        base: folder or hub name of the base.
        folder: the adapter's.
    """
    own = int(read_json(folder / "adapter_config.json").get("r") or 0)
    rank = next((each for each in _VLLM_RANKS if each >= own), own)
    path = folder.absolute()
    words = {"base": base, "name": path.name.lower(), "path": path, "rank": rank}
    quoted = {key: shlex.quote(str(word)) for key, word in words.items()}
    return _ADAPTER_COMMANDS[reader].format_map(quoted)
