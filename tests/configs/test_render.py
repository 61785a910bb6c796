"""Every config in the catalogue is a whole file: five parts, nothing unbound, nothing unused."""

from __future__ import annotations

import ast
import builtins
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtuner.config.adapt.validation import SPLIT_BY
from xtuner.config.check.checker import check
from xtuner.configs import names, render
from xtuner.configs.cards import Code
from xtuner.configs.render import TITLES, literal, width
from xtuner.configs.settings import LAYOUT

GOLDEN = Path(__file__).parents[1] / "golden"
GOLDEN_NAMES = [
    "internlm2_5_chat_7b_qlora_alpaca_e3",
    "qwen2_5_7b_instruct_full_custom_sft_e1",
    "llama3_1_8b_instruct_dpo_lora_varlenattn_ultrafeedback_e1",
    "internlm2_chat_1_8b_reward_full_ultrafeedback",
    "baichuan_7b_qlora_moss_sft_all_e2_gpu8",
    "chatglm3_6b_qlora_lawyer_e3",
    "llama2_7b_full_alpaca_enzh_128k_sp8",
    "internvl_v2_internlm2_5_8b_qlora_finetune",
    "llava_vicuna_7b_v15_qlora_clip_vit_large_p14_336_lora_e1_gpu8_finetune",
]
# The quickstart is the only one that needs more than published names.
COMPOSED = [name for name in names() if not name.startswith("quickstart")]


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """The texts of all configs by name."""
    return {name: render(name) for name in names()}


@pytest.fixture(scope="module")
def bound(texts: dict[str, str]) -> dict[str, Bindings]:
    """What each config imports, assigns and reads, by its name."""
    return {name: bindings(ast.parse(text)) for name, text in texts.items()}


@pytest.fixture(scope="module")
def folder(texts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All configs, written."""
    path = tmp_path_factory.mktemp("configs")
    for name, text in texts.items():
        (path / f"{name}.py").write_text(text, "utf-8")
    return path


Bindings = tuple[dict[str, str], set[str], set[str]]


def bindings(tree: ast.Module) -> Bindings:
    """Imported names with where they come from, assigned names, names that are read."""
    imported: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported.update({alias.name: alias.name for alias in node.names})
        elif isinstance(node, ast.ImportFrom):
            imported.update({alias.name: f"{node.module}:{alias.name}" for alias in node.names})
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    assigned = {node.id for node in found if isinstance(node.ctx, ast.Store)}
    read = {node.id for node in found if isinstance(node.ctx, ast.Load)}
    return imported, assigned, read


def test_every_name_is_bound_and_every_import_used(bound: dict[str, Bindings]) -> None:
    for name, (imported, assigned, read) in bound.items():
        unbound = {n for n in read - set(imported) - assigned if not hasattr(builtins, n)}
        assert not unbound, f"{name}: {unbound}"
        assert not set(imported) - read, f"{name}: unused {set(imported) - read}"


NEW_NAMES = {
    "xtuner.dataset:VisionLanguageDataset",
    "xtuner.dataset.collate_fns:vision_language_collate_fn",
    "xtuner.model:VisionLanguageFinetune",
    "xtuner.tokenization.processor:load_processor",
}
"""Of what v0.1.23 has no counterpart for."""


def test_configs_import_only_published_names(bound: dict[str, Bindings]) -> None:
    published = set(json.loads((GOLDEN / "published_imports.json").read_text("utf-8")))
    published |= NEW_NAMES
    for name in COMPOSED:
        imported, _, _ = bound[name]
        ours = {place for place in imported.values() if place.startswith("xtuner")}
        assert ours <= published, f"{name}: {ours - published}"


def test_five_parts_in_order(texts: dict[str, str]) -> None:
    for name, text in texts.items():
        places = [text.find(title) for title in TITLES]
        assert -1 not in places, name
        assert places == sorted(places), name


def test_no_hole_is_left(texts: dict[str, str]) -> None:
    for name, text in texts.items():
        assert "_HERE" not in text, name


def test_settings_of_part_1_are_all_used(texts: dict[str, str], bound: dict[str, Bindings]) -> None:
    """A setting that nothing reads would be a dead switch."""
    for name in COMPOSED:
        _, settings, _ = bindings(ast.parse(texts[name].partition("PART 2")[0]))
        _, _, read = bound[name]
        unread = settings - read - {"framework"}  # what the start of a run looks at
        assert not unread, f"{name}: {unread}"


def test_every_explained_setting_is_used(bound: dict[str, Bindings]) -> None:
    explained = {name for _, group in LAYOUT for name in group}
    used = {name for _, assigned, _ in bound.values() for name in assigned}
    of_own_rows = {"evaluation_videos"}
    assert explained <= used | of_own_rows, explained - used


def test_ruff_is_content(folder: Path) -> None:
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--isolated", "--no-cache", "."],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden(name: str) -> None:
    """The whole text of a few; after a change that is meant, run with UPDATE_GOLDEN=1."""
    path = GOLDEN / f"{name}.py.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(render(name), "utf-8")
    assert render(name) == path.read_text("utf-8")


def test_validation_and_trackers_stand_in_every_config_to_be_switched_on(
    texts: dict[str, str], tmp_path: Path
) -> None:
    text = render("internlm2_5_chat_7b_qlora_alpaca_e3")
    text, switched = re.subn(r"^# (val_size = )", r"\1", text, flags=re.M)
    tracker = r"^# (visualizer = dict\(\n)# ( .*\n)# (\)\n)"
    text, tracked = re.subn(tracker, r"\1\2\3", text, flags=re.M)
    assert (switched, tracked) == (1, 1)
    config = tmp_path / "c.py"
    config.write_text(text, "utf-8")
    assert check(config) == []
    for name in COMPOSED:
        with_runner = "\nvisualizer = None" in texts[name]  # the Trainer has its own
        assert with_runner == ("\n# visualizer = dict(" in texts[name]), name
        splits = any(builder in texts[name] for builder in SPLIT_BY)
        assert splits >= ("\n# val_size = " in texts[name]), name


def test_the_lines_that_guides_edit() -> None:
    text = render("internlm2_5_chat_7b_qlora_alpaca_e3")
    lines = [line.partition("  #")[0].strip() for line in text.splitlines()]
    assert 'pretrained_model_name_or_path = "internlm/internlm2_5-7b-chat"' in lines
    assert 'alpaca_en_path = "tatsu-lab/alpaca"' in lines
    assert "evaluation_inputs = [" in lines
    assert "dataset=dict(type=load_dataset, path=alpaca_en_path)," in lines
    assert "dataset_map_fn=alpaca_map_fn," in lines


def test_no_config_runs_the_code_of_a_models_folder(texts: dict[str, str]) -> None:
    asked = [name for name in COMPOSED if "trust_remote_code" in texts[name]]
    assert not asked


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    # A carriage return is no line of a config's text.
    | st.text(st.characters(exclude_characters="\r\x00", exclude_categories=["Cs", "Cc"])),
    lambda items: st.lists(items, max_size=3),
    max_leaves=5,
)


@given(VALUES)
def test_literal_reads_back(value: object) -> None:
    assert ast.literal_eval(literal(value)) == value


def test_literal_breaks_long_lists_as_ruff_does() -> None:
    assert literal(["a" * 50, "b" * 50]).splitlines()[0] == "["
    assert literal(["a", "b"]) == '["a", "b"]'
    assert literal(2e-5) == "2e-5"
    assert literal(0.03) == "0.03"
    assert literal(Code("PROMPT_TEMPLATE.gemma")) == "PROMPT_TEMPLATE.gemma"
    assert literal('say "hi"') == "'say \"hi\"'"
    assert width("上海") == 4


def test_literal_breaks_long_texts_at_their_lines() -> None:
    text = "a" * 60 + "\n" + "b" * 60
    assert literal("a\nb") == '"a\\nb"'
    first, second = "a" * 60, "b" * 60
    assert literal(text) == f'(\n    "{first}\\n"\n    "{second}"\n)'
    assert ast.literal_eval(literal(text)) == text


def test_a_file_says_what_its_rows_look_like() -> None:
    head = render("qwen3_8b_lora_custom_sft_e1").partition("import")[0]
    assert '# A row: {"messages": [{"role": "user", "content": ...}, ...]}\n' in head
