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
from mmengine.config import Config

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
TEXTS = {name: render(name) for name in names()}
TREES = {name: ast.parse(text) for name, text in TEXTS.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All configs, written."""
    path = tmp_path_factory.mktemp("configs")
    for name in names():
        (path / f"{name}.py").write_text(TEXTS[name], "utf-8")
    return path


def bindings(tree: ast.Module) -> tuple[dict[str, str], set[str], set[str]]:
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


def test_every_name_is_bound_and_every_import_used() -> None:
    for name in names():
        imported, assigned, read = bindings(TREES[name])
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


def test_configs_import_only_published_names() -> None:
    published = set(json.loads((GOLDEN / "published_imports.json").read_text("utf-8")))
    published |= NEW_NAMES
    for name in COMPOSED:
        imported, _, _ = bindings(TREES[name])
        ours = {place for place in imported.values() if place.startswith("xtuner")}
        assert ours <= published, f"{name}: {ours - published}"


def test_five_parts_in_order() -> None:
    for name in names():
        text = TEXTS[name]
        places = [text.find(title) for title in TITLES]
        assert -1 not in places, name
        assert places == sorted(places), name


def test_no_hole_is_left() -> None:
    for name in names():
        assert "_HERE" not in TEXTS[name], name


def test_settings_of_part_1_are_all_used() -> None:
    """A setting that nothing reads would be a dead switch."""
    for name in COMPOSED:
        text = TEXTS[name]
        _, settings, _ = bindings(ast.parse(text.partition("PART 2")[0]))
        _, _, read = bindings(TREES[name])
        unread = settings - read - {"framework"}  # what the start of a run looks at
        assert not unread, f"{name}: {unread}"


def test_every_explained_setting_is_used() -> None:
    explained = {name for _, group in LAYOUT for name in group}
    used = {name for tree in TREES.values() for name in bindings(tree)[1]}
    assert explained <= used, explained - used


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


def test_settings_reach_what_is_computed_from_them(folder: Path) -> None:
    for name in names():
        config = Config.fromfile(folder / f"{name}.py")._to_lazy_dict()
        if config.get("framework") == "huggingface":
            continue
        wrapper = config["optim_wrapper"]
        assert wrapper["optimizer"]["lr"] == config["lr"], name
        shared = config.get("sequence_parallel_size", 1)
        assert wrapper["accumulative_counts"] in (
            config["accumulative_counts"],
            config["accumulative_counts"] * shared,
        ), name
        assert config["train_dataloader"]["batch_size"] == config["batch_size"], name
        assert config["train_cfg"]["max_epochs"] == config["max_epochs"], name
        warmup, decay = config["param_scheduler"]
        assert warmup["end"] == decay["begin"] == config["warmup_ratio"] * config["max_epochs"]
        if config.get("use_varlen_attn") and "pack_to_max_length" in config:
            assert config["batch_size"] == 1 and config["pack_to_max_length"], name


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden(name: str) -> None:
    """The whole text of a few; after a change that is meant, run with UPDATE_GOLDEN=1."""
    path = GOLDEN / f"{name}.py.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(render(name), "utf-8")
    assert render(name) == path.read_text("utf-8")


def test_validation_and_trackers_stand_in_every_config_to_be_switched_on(tmp_path: Path) -> None:
    text = render("internlm2_5_chat_7b_qlora_alpaca_e3")
    text, switched = re.subn(r"^# (val_size = )", r"\1", text, flags=re.M)
    tracker = r"^# (visualizer = dict\(\n)# ( .*\n)# (\)\n)"
    text, tracked = re.subn(tracker, r"\1\2\3", text, flags=re.M)
    assert (switched, tracked) == (1, 1)
    config = tmp_path / "c.py"
    config.write_text(text, "utf-8")
    assert check(config) == []
    for name in COMPOSED:
        with_runner = "\nvisualizer = None" in TEXTS[name]  # the Trainer has its own
        assert with_runner == ("\n# visualizer = dict(" in TEXTS[name]), name
        splits = any(builder in TEXTS[name] for builder in SPLIT_BY)
        assert splits >= ("\n# val_size = " in TEXTS[name]), name


def test_the_lines_that_guides_edit() -> None:
    text = render("internlm2_5_chat_7b_qlora_alpaca_e3")
    lines = [line.partition("  #")[0].strip() for line in text.splitlines()]
    assert 'pretrained_model_name_or_path = "internlm/internlm2_5-7b-chat"' in lines
    assert 'alpaca_en_path = "tatsu-lab/alpaca"' in lines
    assert "evaluation_inputs = [" in lines
    assert "dataset=dict(type=load_dataset, path=alpaca_en_path)," in lines
    assert "dataset_map_fn=alpaca_map_fn," in lines


def test_no_config_runs_the_code_of_a_models_folder() -> None:
    asked = [name for name in COMPOSED if "trust_remote_code" in TEXTS[name]]
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
