"""Processes that tests start."""

import contextlib
import random
import socket
import subprocess


def free_port() -> int:
    """A port that nothing listens on, below those that Linux gives to outgoing connections.

    By the system's randomness: a seed that a test set would give two tests one port.
    """
    while True:
        port = random.SystemRandom().randint(10_000, 29_999)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


def finish(processes: list[subprocess.Popen[str]], timeout: float) -> list[str]:
    """What processes print until they end; none of them outlives the call.

    Args:
        timeout: seconds for each.
    """
    try:
        return [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
