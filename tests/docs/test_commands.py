"""The commands of the pages exist, with the options that the pages give them."""

import argparse
import functools
import importlib
import re
from collections.abc import Iterator

import pytest

from tests.docs.test_pages import PAIRS, blocks_of, names_in, text_of
from xtuner.entry_point import COMMANDS

PAGES = sorted({page for pair in PAIRS.values() for page in pair})
CALL = re.compile(r"\bxtuner ((?:[a-z_]+[-_a-z]*)(?: .*)?)$")


def lines_of(page) -> Iterator[str]:
    """What a page tells to type: lines of code blocks, and code in the text."""
    for _, lines in blocks_of(page):
        yield from " \n".join(lines).replace("\\ \n", " ").split("\n")
    yield from names_in(text_of(page))


@functools.cache
def options(module: str) -> set[str]:
    """The options of the command in a module, from its help text."""
    parser = argparse.ArgumentParser()
    importlib.import_module(f"xtuner.tools.{module}").add_arguments(parser)
    return {"--debug", *re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", parser.format_help())}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_commands(page):
    for line in lines_of(page):
        call = CALL.search(line.split(" #")[0].strip())
        if not call or re.match(r"(pip|conda|git|cd|export|from|import) ", line):
            continue
        words = call[1].split()
        command = COMMANDS.get(words[0])
        assert command, f"{page.name}: {line}"
        if command.commands:
            inner = words[1] if len(words) > 1 else ""
            if not inner:
                continue
            command = command.commands.get(inner.split("|")[0])
            assert command, f"{page.name}: {line}"
        known = options("train" if words[0] == "dist_train" else command.module)
        asked = {
            word.strip("[]").split("=")[0] for word in words if re.match(r"\[?--?[a-zA-Z]", word)
        }
        assert asked <= known, f"{page.name}: {line}: {asked - known}"


def test_commands_are_found():
    found = [line for page in PAGES for line in lines_of(page) if CALL.search(line)]
    assert len(found) > 200
    assert "--resume" in options("train") and "--no-such" not in options("train")
