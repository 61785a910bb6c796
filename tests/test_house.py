"""The rules of the house. They may only get stricter: fix the code, not the rule."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "xtuner"
FILES = sorted(PACKAGE.rglob("*.py"))

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60
MAX_NESTING = 4
MAX_METHODS = 20
MAX_DATACLASS_FIELDS = 25
MAX_FOLDER_FILES = 25
MAX_IMPORT_CHAIN = 10
MAX_ANY_SHARE = 0.03  # of all arguments

UNTESTED_LINES = 150  # modules above need a test of their name
TESTED_BY = {
    "xtuner/export/streaming_merge.py": "test_merge.py",
    "xtuner/apis/datasets.py": "test_apis.py",
    "xtuner/apis/models.py": "test_apis.py",
    "xtuner/config/definitions.py": "test_local_modules.py",
    "xtuner/configs/datasets.py": "test_published_settings.py",
    "xtuner/configs/settings.py": "test_published_settings.py",
    "xtuner/configs/models/gemma.py": "test_cards.py",
    "xtuner/configs/models/internlm.py": "test_published_settings.py",
    "xtuner/configs/models/llama.py": "test_published_settings.py",
    "xtuner/model/transformers_models/decoder.py": "test_golden.py",
    "xtuner/model/transformers_models/intern_vit/modeling_intern_vit.py": "test_internvl_chat.py",
    "xtuner/planning/planned_model.py": "test_memory.py",
    "xtuner/planning/settings.py": "test_plan.py",
    "xtuner/proving/export_proofs.py": "test_prove.py",
    "xtuner/proving/fresh.py": "test_rehearsal.py",
    "xtuner/proving/gradient_proofs.py": "test_prove.py",
    "xtuner/proving/run_proofs.py": "test_prove.py",
    "xtuner/proving/stage_work.py": "test_rehearsal.py",
    "xtuner/proving/templates.py": "test_check_template.py",
    "xtuner/tokenization/chat_template.py": "test_messages.py",
    "xtuner/utils/types.py": "test_house.py",  # types alone: mypy checks them
}
"""Modules that are tables or parts of one thing, and the test that sees them."""

# Which parts of the package each part may import. A part may always import itself.
LEAVES = {"utils", "registry", "version"}
BELOW_ENGINE = LEAVES | {"parallel", "tokenization", "dataset", "doctor", "model", "evaluation"}
MAY_IMPORT = {
    "utils": set(),
    "registry": {"utils"},
    "version": set(),
    "library_errors": {"utils"},
    "crash": {"utils", "library_errors"},
    "configs": set(),
    "quickstart": LEAVES,
    "parallel": LEAVES,
    "tokenization": LEAVES,
    "dataset": LEAVES | {"parallel", "tokenization"},
    "doctor": LEAVES | {"tokenization", "dataset"},
    "model": LEAVES | {"parallel"},
    "evaluation": LEAVES | {"parallel"},
    "checkpoint": LEAVES | {"parallel"},
    "export": LEAVES | {"tokenization", "model", "checkpoint"},
    "config": LEAVES | {"configs"},
    "reporting": LEAVES | {"parallel", "dataset"},
    "planning": LEAVES | {"parallel", "model", "config"},
    "engine": BELOW_ENGINE | {"configs", "config", "checkpoint", "export", "reporting", "planning"},
    "chat": LEAVES | {"parallel", "tokenization", "dataset", "model"},
    "apis": BELOW_ENGINE | {"configs", "config", "engine"},
    # runs commands as a user does
    "proving": BELOW_ENGINE
    | {"configs", "config", "checkpoint", "export", "planning"}
    | {"engine", "chat", "library_errors", "entry_point"},
}


# Files elsewhere that answer questions about a whole config.
READ_CONFIGS = {
    "xtuner/checkpoint/resume.py",
    "xtuner/export/llava.py",
    "xtuner/export/trained_template.py",
    "xtuner/planning/settings.py",
    "xtuner/reporting/summary.py",
}


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module


def relative(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.fixture(scope="module")
def trees() -> dict[Path, ast.Module]:
    return {file: ast.parse(file.read_text("utf-8")) for file in FILES}


def test_imports_go_down_only(trees):
    wrong = []
    for file, tree in trees.items():
        part = part_of(file)
        if part in ("tools", "entry_point", "__init__", "__main__") or "oneoffs" in file.parts:
            continue  # tools are on top; one-off configs are texts that users get
        if "parts" in file.parts:
            continue  # fragments of configs, likewise
        for line, name in imports(tree):
            words = name.split(".")
            if words[0] != "xtuner" or len(words) < 2:
                continue
            if words[1] != part and words[1] not in MAY_IMPORT[part]:
                wrong.append(f"{relative(file)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imported_modules(node: ast.AST, known: set[str], lazy: bool = True) -> Iterator[str]:
    """The modules of the package that a file imports; those for type checkers do not count.

    Args:
        node: the file, or a part of it.
        known: all modules of the package.
        lazy: count imports inside functions, too.
    """
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            continue
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not lazy:
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names if alias.name in known)
        elif isinstance(child, ast.ImportFrom) and child.module and not child.level:
            for alias in child.names:
                submodule = f"{child.module}.{alias.name}"
                target = submodule if submodule in known else child.module
                if target in known:
                    yield target
        yield from imported_modules(child, known, lazy)


def import_graph(trees: dict[Path, ast.Module], lazy: bool) -> dict[str, set[str]]:
    """For each module of the package the modules of the package that it imports."""
    texts = {"oneoffs", "parts"}  # texts that users get
    modules = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): tree
        for file, tree in trees.items()
        if not ("configs" in file.parts and texts & set(file.parts))
    }
    known = set(modules)
    return {
        name: set(imported_modules(tree, known, lazy)) - {name} for name, tree in modules.items()
    }


def cyclic_part(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """What is left of a graph when all modules are taken away that are on no cycle's way."""
    graph = dict(graph)
    while True:
        targets = set().union(*graph.values()) if graph else set()
        left = {
            name: to & graph.keys()
            for name, to in graph.items()
            if to & graph.keys() and name in targets
        }
        if left == graph:
            return graph
        graph = left


def test_modules_do_not_import_each_other_in_circles(trees):
    """Imports inside functions count: they hide a cycle, they do not remove it."""
    cyclic = cyclic_part(import_graph(trees, lazy=True))
    assert not cyclic, "\n".join(f"{name}: {sorted(to)}" for name, to in sorted(cyclic.items()))


def test_import_chains_are_short(trees):
    graph = import_graph(trees, lazy=False)
    chains: dict[str, list[str]] = {}

    def longest(name: str) -> list[str]:
        if name not in chains:
            below = [longest(target) for target in graph[name]]
            chains[name] = [name, *max(below, key=len, default=[])]
        return chains[name]

    chain = max((longest(name) for name in graph), key=len)
    assert len(chain) <= MAX_IMPORT_CHAIN, " -> ".join(chain)


def test_folders_are_small():
    folders = {file.parent for file in FILES} - {PACKAGE / "configs" / "parts"}
    counts = {folder: len(list(folder.glob("*.py"))) for folder in folders}
    wrong = [f"{relative(f)}: {n} files" for f, n in counts.items() if n > MAX_FOLDER_FILES]
    assert not wrong, "\n".join(wrong)


def test_arguments_have_types(trees):
    everything, untyped = 0, []
    for file, tree in trees.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            listed = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            listed += [extra for extra in (node.args.vararg, node.args.kwarg) if extra]
            for argument in listed:
                if argument.arg in ("self", "cls"):
                    continue
                everything += 1
                if argument.annotation is None or ast.unparse(argument.annotation) == "Any":
                    untyped.append(f"{relative(file)}:{node.lineno} {node.name}({argument.arg})")
    share = len(untyped) / everything
    assert share <= MAX_ANY_SHARE, f"{share:.1%} of all arguments:\n" + "\n".join(untyped)


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring: contracts may be as long as they need to be."""
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function):
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


def test_files_and_functions_fit(trees):
    wrong = []
    for file, tree in trees.items():
        lines = len(file.read_text("utf-8").splitlines())
        if lines > MAX_FILE_LINES:
            wrong.append(f"{relative(file)}: {lines} lines")
        for node in ast.walk(tree):
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            if is_function and code_lines(node) > MAX_FUNCTION_LINES:
                wrong.append(
                    f"{relative(file)}:{node.lineno} {node.name}: {code_lines(node)} lines"
                )
    assert not wrong, "\n".join(wrong)


def nesting(node: ast.AST, depth: int = 0) -> int:
    blocks = (ast.If, ast.For, ast.While, ast.With, ast.Try)
    deepest = depth
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse
        inner = depth + (isinstance(child, blocks) and not is_elif)
        deepest = max(deepest, nesting(child, inner))
    return deepest


def test_nesting_is_shallow(trees):
    wrong = [
        f"{relative(file)}:{node.lineno} {node.name}: {nesting(node)}"
        for file, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and nesting(node) > MAX_NESTING
    ]
    assert not wrong, "\n".join(wrong)


def test_classes_are_small(trees):
    wrong = []
    for file, tree in trees.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ClassDef):
                continue
            methods = sum(isinstance(item, ast.FunctionDef) for item in node.body)
            fields = sum(isinstance(item, ast.AnnAssign) for item in node.body)
            if methods > MAX_METHODS:
                wrong.append(f"{relative(file)}:{node.lineno} {node.name}: {methods} methods")
            if fields > MAX_DATACLASS_FIELDS:
                wrong.append(f"{relative(file)}:{node.lineno} {node.name}: {fields} fields")
    assert not wrong, "\n".join(wrong)


AUTO_CLASSES = re.compile(r"\bAuto(Config|Model\w*|Tokenizer)\b")


def test_auto_classes_know_our_models(trees):
    """transformers' own would run the code of folders whose families ``auto`` registers."""
    wrong = []
    for file, tree in trees.items():
        if {"configs", "transformers_models"} & set(file.parts):
            continue  # what configs name is built by BUILDER, which registers them
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "transformers":
                names = [alias.name for alias in node.names if AUTO_CLASSES.match(alias.name)]
                wrong += [f"{relative(file)}:{node.lineno} imports {name}" for name in names]
    # hands them to BUILDER; loads as those do who have transformers alone
    allowed = ("xtuner/dataset/internvl.py", "xtuner/proving/fresh.py")
    assert not [line for line in wrong if not line.startswith(allowed)], "\n".join(wrong)


def test_every_file_says_what_it_is_for(trees):
    without = [
        relative(file)
        for file, tree in trees.items()
        if tree.body
        and "oneoffs" not in file.parts
        and "parts" not in file.parts
        and not ast.get_docstring(tree)
    ]
    assert not without, "\n".join(without)


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


UNSTEADY = {
    "time.sleep": "forked.wait_until",
    "time.perf_counter": "nothing: a loaded machine takes its time",
    "time.monotonic": "forked.wait_until",
    "random.randint": "launch.free_port, or a generator with a seed",
}
"""What makes a test fail on a loaded machine, and what to use instead."""
SHORTEST_LIMIT = 300  # seconds that a process may take


def test_tests_do_not_depend_on_the_load():
    wrong = []
    for file in sorted((ROOT / "tests").rglob("*.py")):
        if file.name in ("forked.py", "test_house.py"):
            continue
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            place, name = f"{file.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.func)
            if name in UNSTEADY:
                wrong.append(f"{place}: {name}; use {UNSTEADY[name]}")
            limits = [word.value for word in node.keywords if word.arg == "timeout"]
            for limit in limits:
                if isinstance(limit, ast.Constant) and limit.value < SHORTEST_LIMIT:
                    wrong.append(f"{place}: timeout={limit.value}; use forked.LIMIT")
    assert not wrong, "\n".join(wrong)


def test_nothing_runs_what_a_file_carries(trees):
    wrong = []
    for file, tree in trees.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = called(node)
            settings = {word.arg: ast.unparse(word.value) for word in node.keywords}
            unsafe_load = name == "torch.load" and settings.get("weights_only") != "True"
            if name in ("eval", "exec", "pickle.load", "pickle.loads") or unsafe_load:
                wrong.append(f"{relative(file)}:{node.lineno} {name}")
    assert not wrong, "\n".join(wrong)


def test_only_configs_and_the_start_of_a_run_read_configs_by_key(trees):
    """Components take flat keyword arguments; a parameter called cfg means they dig for them."""
    readers = ("train", "huggingface", "launch")
    wrong = []
    for file, tree in trees.items():
        part = part_of(file)
        reads = part == "engine" and (file.stem in readers or file.parent.name == "runner")
        reads |= relative(file) in READ_CONFIGS
        if part in ("tools", "config", "configs", "entry_point", "apis") or reads:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                names = {argument.arg for argument in node.args.args + node.args.kwonlyargs}
                if names & {"cfg"} and not node.name.startswith("_build"):
                    wrong.append(f"{relative(file)}:{node.lineno} {node.name}(cfg)")
    assert not wrong, "\n".join(wrong)


def test_the_architecture_page_names_files_that_are_there():
    """Where is attention, the loss, resuming? The page answers with files; they must exist."""
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    names = {file.relative_to(ROOT).as_posix() for file in ROOT.rglob("*.py")}
    missing = []
    for name in re.findall(r"`([\w/{},.]+\.py)(?::[^`]*)?`", text):
        stem, braces, rest = re.match(r"([^{]*)(?:\{([^}]*)\})?(.*)", name).groups()
        for choice in (braces or "").split(","):
            wanted = f"/{stem}{choice}{rest}"
            if not any(f"/{found}".endswith(wanted) for found in names):
                missing.append(wanted)
    assert not missing, "\n".join(missing)


def test_large_modules_have_a_test_of_their_name(trees):
    """A failure shows where the fault is, not three floors above."""
    names = {file.name for file in (ROOT / "tests").rglob("test_*.py")}
    missing = []
    for file in trees:
        if file.parent == PACKAGE / "configs" / "oneoffs":
            continue
        name = file.parent.name if file.stem == "__init__" else file.stem.removeprefix("modeling_")
        tested = f"test_{name.strip('_')}.py" in names or relative(file) in TESTED_BY
        if len(file.read_text("utf-8").splitlines()) > UNTESTED_LINES and not tested:
            missing.append(relative(file))
    wrong = [test for test in TESTED_BY.values() if test not in names]
    assert not missing + wrong, "\n".join(missing + wrong)


def names_of(tree: ast.Module) -> set[str] | None:
    """What a module defines at its top level; None where it finds names when they are asked for."""
    names: set[str] = set()
    methods: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        if isinstance(node, ast.ClassDef):
            methods |= {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
    return None if "__getattr__" in names - methods else names


def test_imports_name_what_is_there(trees):
    """Those inside functions too: a moved module is otherwise missed until a user calls them."""
    folders = ("tests", "benchmarks", "scripts")
    more = {file: ast.parse(file.read_text("utf-8")) for f in folders for file in files_in(f)}
    modules = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): tree
        for file, tree in {**trees, **more}.items()
    }
    names = {module: names_of(tree) for module, tree in modules.items()}
    wrong = []
    for file, tree in {**trees, **more}.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or node.level:
                continue
            module = str(node.module)
            if module.partition(".")[0] not in ("xtuner", *folders):
                continue
            defined = names.get(module, set())
            wrong += [
                f"{relative(file)}:{node.lineno} {module}.{alias.name}"
                for alias in node.names
                if defined is not None
                and alias.name not in defined
                and f"{module}.{alias.name}" not in modules
            ]
    assert not wrong, "\n".join(wrong)


def files_in(folder: str) -> list[Path]:
    """The modules of a folder beside the package; inputs of tests are no modules."""
    return [file for file in (ROOT / folder).rglob("*.py") if file.stem.isidentifier()]
