"""``xtuner check-custom-dataset``: the command on real configs, whatever their builder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from transformers import CLIPImageProcessor

from tests.helpers.tiny import make_tokenizer
from xtuner.entry_point import main
from xtuner.utils.constants import IMAGE_TOKEN_INDEX

HEAD = """
from datasets import load_dataset
from transformers import AutoTokenizer
from xtuner.dataset import (
    ConcatDataset, InternVL_V1_5_Dataset, LLaVADataset, MOSSSFTDataset,
    build_packed_dataset, process_hf_dataset,
)
from xtuner.dataset.map_fns import alpaca_map_fn, llava_map_fn, openai_map_fn
from xtuner.dataset.preference_dataset import build_preference_dataset, load_jsonl_dataset
from xtuner.dataset.preference_dataset import orpo_dpo_mix_40k_map_fn

def rows_of(path):
    return dict(type=load_dataset, path="json", data_files=dict(train=path))

"""

ALPACA = {"instruction": "Name a river.", "input": "", "output": "The Rhine."}
ROLE = {"role": "assistant"}
CHAT = {
    "messages": [
        {"role": "user", "content": "Name a river."},
        {"role": "assistant", "content": "The Rhine."},
    ]
}


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, *rows: object) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def check(dataset: str, capsys, *words: str) -> tuple[int, dict]:
    """Status and report of a config whose dataset is this expression."""
    Path("config.py").write_text(f"{HEAD}train_dataloader = dict(dataset={dataset})\n")
    status = main(["check-custom-dataset", "config.py", "--json", *words])
    return status, json.loads(capsys.readouterr().out)


def reported(capsys) -> tuple[int, dict]:
    """Status and report of the config that is there."""
    status = main(["check-custom-dataset", "config.py", "--json"])
    return status, json.loads(capsys.readouterr().out)


def codes(report: dict) -> dict[str, list[int]]:
    return {
        finding["code"]: [place["line"] for place in finding["places"]]
        for finding in report["findings"]
    }


ALPACA_PART = (
    "dict(type=process_hf_dataset, dataset=dict(type=load_dataset, path='json', "
    "data_files=dict(train='{file}')), dataset_map_fn=alpaca_map_fn, max_length=64)"
)


def test_clean_data_gives_status_0(workspace, capsys):
    write("a.jsonl", ALPACA)
    status, report = check(ALPACA_PART.format(file="a.jsonl"), capsys)
    assert status == 0
    assert report["clean"] is True
    assert report["rows"] == report["good"] == 1
    assert report["layouts"] == {"alpaca": 1}


def test_the_map_function_that_fits_is_written_where_the_config_has_the_wrong_one(
    workspace, capsys
):
    """Also where the dataset is a variable of its own, and the column stands in the way."""
    write("a.jsonl", CHAT)
    text = f"{HEAD}train_dataset = {ALPACA_PART.format(file='a.jsonl')}\n"
    text += "train_dataloader = dict(dataset=train_dataset)\n"
    Path("config.py").write_text(text)
    line = next(n for n, each in enumerate(text.splitlines(), 1) if each.startswith("train_data"))
    assert main(["check-custom-dataset", "config.py"]) == 1
    assert f"replaces dataset_map_fn at config.py:{line}; --fix" in capsys.readouterr().out
    assert main(["check-custom-dataset", "config.py", "--fix"]) == 1
    assert "Written to config.py" in capsys.readouterr().out
    assert Path("config.py.bak").read_text() == text
    assert main(["check-custom-dataset", "config.py"]) == 0
    fixed = Path("config.py").read_text()
    assert "dataset_map_fn=openai_map_fn" in fixed and "alpaca_map_fn, max_length" not in fixed


ALPACA_FN, CHAT_FN = "dataset_map_fn=alpaca_map_fn", "dataset_map_fn=openai_map_fn"
PARTS = {
    "written in the parts": (
        "train_dataset = dict(type=ConcatDataset, datasets=[\n    {alpaca},\n    {chat}])\n",
        ("{chat}])", "{chat_fixed}])"),
    ),
    "variables": (
        "a = {alpaca}\nb = {chat}\ntrain_dataset = dict(type=ConcatDataset, datasets=[a, b])\n",
        ("b = {chat}", "b = {chat_fixed}"),
    ),
    "one name for both": (
        "map_fn = alpaca_map_fn\na = {alpaca}\nb = {chat}\n"
        "train_dataset = dict(type=ConcatDataset, datasets=[a, b])\n",
        ("b = {chat}", "b = {chat_fixed}"),
    ),
    "one dict that both copy": (
        "a = {alpaca}\nb = dict(a, dataset=rows_of('b.jsonl'))\n"
        "train_dataset = dict(type=ConcatDataset, datasets=[a, b])\n",
        ("dict(dataset=train_dataset)\n", "dict(dataset=train_dataset)\n{statement}"),
    ),
    "a part of a part, in a packed dataset": (
        "inner = dict(type=ConcatDataset, datasets=[{chat}])\n"
        "train_dataset = dict(type=build_packed_dataset, dataset_cfg=\n"
        "    dict(type=ConcatDataset, datasets=[{alpaca}, inner]), max_length=64)\n",
        ("inner = dict(type=ConcatDataset, datasets=[{chat}", "{inner_fixed}"),
    ),
}


@pytest.mark.parametrize(("dataset", "edit"), PARTS.values(), ids=PARTS)
def test_the_part_whose_map_function_is_wrong_is_fixed_and_no_other(
    dataset, edit, workspace, capsys
):
    write("a.jsonl", ALPACA)
    write("b.jsonl", CHAT)
    shared = ALPACA_PART.replace("=alpaca_map_fn", "=map_fn")
    part = shared if "map_fn = " in dataset else ALPACA_PART
    chat = part.format(file="b.jsonl")
    chat_fixed = ALPACA_PART.format(file="b.jsonl").replace(ALPACA_FN, CHAT_FN)
    statement = "train_dataloader['dataset']['datasets'][1]['dataset_map_fn'] = openai_map_fn\n"
    names = {
        "alpaca": part.format(file="a.jsonl"),
        "chat": chat,
        "chat_fixed": chat_fixed,
        "statement": statement,
        "inner_fixed": f"inner = dict(type=ConcatDataset, datasets=[{chat_fixed}",
    }
    text = f"{HEAD}{dataset.format(**names)}train_dataloader = dict(dataset=train_dataset)\n"
    Path("config.py").write_text(text)
    assert main(["check-custom-dataset", "config.py", "--fix", "--json"]) == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["findings"][0]["code"] == "wrong-map-fn"
    assert f"{CHAT_FN} replaces dataset_map_fn at config.py:" in said.err
    old, new = (each.format(**names) for each in edit)
    fixed = Path("config.py").read_text()
    assert fixed.replace("from xtuner.dataset.map_fns import openai_map_fn\n", "", 1) == (
        text.replace(old, new)
    )
    assert main(["check-custom-dataset", "config.py"]) == 0


def test_each_part_gets_the_map_function_of_its_rows_and_overrides_stay_out(workspace, capsys):
    write("a.jsonl", {"question": "q", "answer": "a", "system": "S"})
    write("b.jsonl", CHAT)
    parts = [ALPACA_PART.format(file=f"{name}.jsonl") for name in "ab"]
    text = f"{HEAD}train_dataloader = dict(batch_size=1, dataset=dict(type=ConcatDataset, "
    text += f"datasets=[{', '.join(parts)}]))\n"
    Path("config.py").write_text(text)
    words = ["--cfg-options", "train_dataloader.batch_size=2"]
    assert main(["check-custom-dataset", "config.py", "--fix", *words]) == 1
    fixed = Path("config.py").read_text()
    assert "batch_size=1" in fixed
    assert fixed.index("dataset_map_fn=auto_map_fn") < fixed.index(CHAT_FN)
    assert main(["check-custom-dataset", "config.py"]) == 0


def test_rows_of_several_layouts_are_left_to_the_user(workspace, capsys):
    write("a.jsonl", CHAT, {"abstract": "a", "title": "b"})
    text = f"{HEAD}train_dataloader = dict(dataset={ALPACA_PART.format(file='a.jsonl')})\n"
    Path("config.py").write_text(text)
    assert main(["check-custom-dataset", "config.py", "--fix"]) == 1
    assert "replaces" not in capsys.readouterr().out
    assert Path("config.py").read_text() == text


@pytest.mark.parametrize("map_fn", ["alpaca_map_fn", "oasst1_map_fn"])
def test_several_layouts_of_one_file_get_the_function_that_reads_all(map_fn, workspace, capsys):
    write("a.jsonl", CHAT, ALPACA, {"conversations": [{"from": "human", "value": "q"}]})
    part = ALPACA_PART.format(file="a.jsonl").replace("=alpaca_map_fn", f"={map_fn}")
    text = f"{HEAD}train_dataloader = dict(dataset={part})\n"
    Path("config.py").write_text(
        text.replace("import alpaca_map_fn", f"import {map_fn}, alpaca_map_fn")
    )
    assert main(["check-custom-dataset", "config.py", "--fix"]) == 1
    assert "dataset_map_fn=auto_map_fn replaces" in capsys.readouterr().out
    _, report = reported(capsys)
    assert "wrong-map-fn" not in codes(report) and "mixed-layouts" not in codes(report)


def test_map_functions_of_image_data_are_fixed_too(workspace, capsys):
    """The dataset of a vision-language model reads rows by its map function, as any other."""
    from xtuner.dataset import LLaVADataset
    from xtuner.dataset.map_fns import openai_map_fn

    Path("images").mkdir()
    Image.new("RGB", (32, 32)).save("images/dog.jpg")
    said = [
        {"role": "user", "content": "<image>\nWhat?"},
        {"role": "assistant", "content": "A dog."},
    ]
    Path("a.json").write_text(json.dumps([image_row("dog", "<image>\nWhat?")]))
    Path("b.json").write_text(json.dumps([{"image": "dog.jpg", "messages": said}]))
    parts = [
        f"dict(type=LLaVADataset, data_path='{name}.json', image_folder='images', "
        f"dataset_map_fn={function})"
        for name, function in (("a", "alpaca_map_fn"), ("b", "llava_map_fn"))
    ]
    dataset = f"dict(type=ConcatDataset, datasets=[{', '.join(parts)}])"
    Path("config.py").write_text(f"{HEAD}train_dataloader = dict(dataset={dataset})\n")
    assert main(["check-custom-dataset", "config.py", "--fix"]) == 1
    fixed = Path("config.py").read_text()
    assert fixed.index("dataset_map_fn=llava_map_fn") < fixed.index("dataset_map_fn=openai_map_fn")
    capsys.readouterr()
    status, report = reported(capsys)
    assert status == 0 and not {"wrong-map-fn", "mixed-layouts"} & codes(report).keys()
    built = LLaVADataset(
        tokenizer=make_tokenizer(),
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
        data_path="b.json",
        image_folder="images",
        dataset_map_fn=openai_map_fn,
        max_length=64,
    )
    assert IMAGE_TOKEN_INDEX in built[0]["input_ids"]


def test_map_functions_of_a_trainer_config_are_fixed_too(workspace, capsys):
    write("a.jsonl", CHAT)
    text = f"{HEAD}framework = 'huggingface'\n"
    Path("config.py").write_text(f"{text}train_dataset = {ALPACA_PART.format(file='a.jsonl')}\n")
    assert main(["check-custom-dataset", "config.py", "--fix"]) == 1
    assert f"{CHAT_FN}, max_length" in Path("config.py").read_text()


OTHERS = {
    "ms-swift": {"query": "q", "response": "a", "history": [["b", "c"]], "system": "S"},
    "llama-factory": {"instruction": "q", "input": "", "output": "a", "history": [["b", "c"]]},
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "1+2?"},
            {"from": "function_call", "value": "{}"},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "3."},
        ]
    },
    "sharegpt (role/content)": {"conversations": CHAT["messages"]},
    "question/answer": {"question": "q", "answer": "a", "system": "S"},
}


@pytest.mark.parametrize(("name", "row"), OTHERS.items(), ids=OTHERS)
@pytest.mark.parametrize("map_fn", ["alpaca_map_fn", "None", "auto_map_fn"])
def test_layouts_of_other_tools_are_named(name, row, map_fn, workspace, capsys):
    write("a.jsonl", row)
    part = ALPACA_PART.format(file="a.jsonl").replace("alpaca_map_fn", map_fn)
    part = part.replace("auto_map_fn", "'auto_map_fn'") if map_fn == "auto_map_fn" else part
    _, report = check(part, capsys)
    if map_fn == "auto_map_fn":
        assert report["layouts"] == {name: 1}
        assert not [f for f in report["findings"] if f["level"] == "error"]
        return
    (finding,) = [f for f in report["findings"] if f["level"] == "error"]
    assert finding["code"] == "wrong-map-fn"
    assert "dataset_map_fn=auto_map_fn" in finding["paste"]
    assert finding["places"][0]["detail"] == f"layout {name}"


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": CHAT["messages"], "rejected": [*CHAT["messages"][:1], {**ROLE, "content": "b"}]},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": CHAT["messages"][:1], "chosen": "a", "rejected": "b"},
        {"messages": CHAT["messages"], "rejected_response": "b"},
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
    ],
)
def test_preference_rows_in_their_spellings(row, workspace, capsys):
    write("a.jsonl", row)
    part = "dict(type=build_preference_dataset, dataset=dict(type=load_jsonl_dataset, "
    status, report = check(f"{part}data_files='a.jsonl'))", capsys)
    assert (status, codes(report)) == (0, {})


def test_images_of_a_pair_for_text_are_named(workspace, capsys):
    pair = {"messages": CHAT["messages"], "rejected_response": "b"}
    write("a.jsonl", {**pair, "images": ["a.png"]})
    part = "dict(type=build_preference_dataset, dataset=dict(type=load_jsonl_dataset, "
    _, report = check(f"{part}data_files='a.jsonl'))", capsys)
    assert codes(report) == {"image-in-text": [1]}


def test_preference_texts_without_a_prompt_are_no_pair(workspace, capsys):
    write("a.jsonl", {"chosen": "q a", "rejected": "q b"})  # training refuses it, too
    part = "dict(type=build_preference_dataset, dataset=dict(type=load_jsonl_dataset, "
    status, report = check(f"{part}data_files='a.jsonl'))", capsys)
    assert (status, codes(report)) == (1, {"missing-field": [1]})


def test_missing_fields_list_those_that_are_there(workspace, capsys):
    write("a.jsonl", {"foo": "a", "bar": "b"})
    _, report = check(ALPACA_PART.format(file="a.jsonl"), capsys)
    assert "(there are: foo, bar)" in report["findings"][0]["places"][0]["detail"]
    Path("a.json").write_text(json.dumps({"data": [ALPACA] * 2}))
    _, report = check(ALPACA_PART.format(file="a.json"), capsys)
    assert "field='data'" in report["findings"][0]["places"][0]["detail"]


def test_every_row_is_looked_at_not_only_the_first(workspace, capsys):
    rows = [{**ALPACA, "instruction": f"Name river {n}."} for n in range(300)]
    rows[299]["output"] = None
    write("a.jsonl", *rows)
    status, report = check(ALPACA_PART.format(file="a.jsonl"), capsys)
    assert status == 1
    assert codes(report) == {"wrong-type": [300]}


def test_parts_of_a_concat_dataset_each_in_its_layout(workspace, capsys):
    write("a.jsonl", ALPACA)
    write("b.jsonl", CHAT, CHAT)
    chat = ALPACA_PART.format(file="b.jsonl").replace("alpaca_map_fn", "openai_map_fn")
    joined = f"dict(type=ConcatDataset, datasets=[{ALPACA_PART.format(file='a.jsonl')}, {chat}])"
    status, report = check(joined, capsys)
    assert codes(report) == {"duplicate": [2]}
    assert report["layouts"] == {"alpaca": 1, "openai": 1 + 1}
    assert status == 0  # it can be trained on
    assert check(joined, capsys, "--strict")[0] == 1


def test_preference_data(workspace, capsys):
    ask = {"role": "user", "content": "Name a river."}
    good, bad = (
        [ask, {"role": "assistant", "content": text}] for text in ("The Rhine.", "The Moon.")
    )
    write("p.jsonl", {"chosen": good, "rejected": bad}, {"chosen": good, "rejected": good})
    dataset = (
        "dict(type=build_preference_dataset, dataset=dict(type=load_dataset, path='json', "
        "data_files='p.jsonl'), dataset_map_fn=orpo_dpo_mix_40k_map_fn)"
    )
    _, report = check(dataset, capsys)
    assert codes(report) == {"same-choice": [2]}
    write("q.jsonl", {"prompt": [ask], "chosen": good[1:], "rejected": bad[1:]})
    dataset = (
        "dict(type=build_preference_dataset, dataset=dict(type=load_jsonl_dataset, "
        "data_files=['q.jsonl']))"
    )
    assert check(dataset, capsys)[0] == 0


def image_row(name: str, text: str) -> dict:
    said = [{"from": "human", "value": text}, {"from": "gpt", "value": f"A {name}."}]
    return {"image": f"{name}.jpg", "conversations": said}


def test_image_data_its_files_and_marks(workspace, capsys):
    Path("images").mkdir()
    Path("images/dog.jpg").touch()
    rows = [image_row("dog", "<image>\nWhat?"), image_row("dog", "Who?")]
    rows.append(image_row("cat", "<image>\nWhat?"))
    Path("llava.json").write_text(json.dumps(rows, indent=1))
    dataset = (
        "dict(type=LLaVADataset, data_path='llava.json', image_folder='images', "
        "dataset_map_fn=llava_map_fn)"
    )
    _, report = check(dataset, capsys)
    found = {one["code"]: one["places"][0] for one in report["findings"]}
    assert set(found) == {"missing-image", "image-mark"}
    assert found["missing-image"]["detail"] == "images/cat.jpg"
    dataset = (
        "dict(type=InternVL_V1_5_Dataset, data_paths=['llava.json'], image_folders=['images'])"
    )
    assert set(codes(check(dataset, capsys)[1])) == {"missing-image", "image-mark"}


def test_moss_rows_are_read_as_they_are(workspace, capsys):
    Path("moss.jsonl").write_text('{"meta_instruction": "a"}\n{"meta\n')
    _, report = check("dict(type=MOSSSFTDataset, data_file='moss.jsonl')", capsys)
    assert codes(report) == {"bad-json": [2]}


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("x = 1\n", "train_dataloader.dataset"),
        ("train_dataloader = dict(batch_size=1)\n", "train_dataloader.dataset"),
        ("framework = 'huggingface'\n", "train_dataset"),
    ],
)
def test_a_config_without_a_dataset_is_refused(workspace, capsys, text, key):
    Path("config.py").write_text(text)
    assert main(["check-custom-dataset", "config.py"]) == 1
    error = capsys.readouterr().err
    assert f"config.py ({key}): the config has no training dataset" in error


def test_a_missing_file_is_refused(workspace, capsys):
    Path("config.py").write_text(
        f"{HEAD}train_dataloader = dict(dataset={ALPACA_PART.format(file='none.jsonl')})\n"
    )
    assert main(["check-custom-dataset", "config.py"]) == 1
    assert "there is no data file 'none.jsonl'" in capsys.readouterr().err


def test_the_report_fits_the_terminal_and_the_page_is_whole(workspace, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    write("a.jsonl", CHAT, {**ALPACA, "output": "</pre><script>\u200b"})
    Path("config.py").write_text(
        f"{HEAD}train_dataloader = dict(dataset={ALPACA_PART.format(file='a.jsonl')})\n"
    )
    assert main(["check-custom-dataset", "config.py", "--html", "out.html"]) == 1
    out = capsys.readouterr().out
    # what may be copied is one line, however long
    assert max(len(line) for line in out.splitlines() if "--fix" not in line) <= 80
    assert "a.jsonl:1" in out
    page = Path("out.html").read_text("utf-8")
    assert "<script>" not in page
    assert page.rstrip().endswith("</html>")


def test_demo_data_passes(monkeypatch, capsys):
    demos = Path(__file__).parent.parent.parent / "examples" / "demo_data"
    names = sorted(folder.name for folder in demos.iterdir() if folder.is_dir())
    assert names == ["multi_turn_1", "multi_turn_2", "pretrain", "single_turn"]
    for name in names:
        monkeypatch.chdir(demos / name)
        assert main(["check-custom-dataset", "config.py", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["findings"] == []
        assert report["rows"] > 0
