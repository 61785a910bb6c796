"""Errors of libraries reach the screen as messages for users, unforeseen ones in three lines."""

from __future__ import annotations

import errno
import gzip
import json
import zipfile
from pathlib import Path

import pytest

from xtuner import entry_point
from xtuner.library_errors import translate
from xtuner.utils.errors import UserError, Where, activity, first_sentence


def damaged(name: str, content: bytes = b"{") -> Path:
    path = Path(name)
    path.write_bytes(content)
    return path


def full_disk():
    raise OSError(errno.ENOSPC, "No space left on device", "/work/iter_1.pth")


def used_port():
    raise OSError(errno.EADDRINUSE, "Address already in use")


def worded_by_a_library():
    raise FileNotFoundError("hub/iter_1.pth can not be found.")


def unregistered():
    from mmengine.registry import OPTIMIZERS, build_from_cfg

    if "TestAdam" not in OPTIMIZERS:
        OPTIMIZERS.register_module("TestAdam", module=dict)
    build_from_cfg(dict(type="TestAdan"), OPTIMIZERS)


def broken_json():
    path = damaged("tokenizer_config.json", b'{"a":\n 1,}')
    json.loads(path.read_text())


def broken_json_beside_the_file_in_view():
    path = damaged("tokenizer_config.json", b"{}")
    json.loads(damaged("tokenizer.json", b'{"a": 1').with_name("tokenizer.json").read_text())
    return path


def not_utf8():
    path = damaged("rows.txt", "\u4f60".encode("gbk"))
    path.read_text("utf-8")


def damaged_weights():
    from safetensors import safe_open

    file = str(damaged("model.safetensors"))
    safe_open(file, "pt")


def no_such_model():
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained("no/such-model")


def model_folder_without_weights():
    from transformers import AutoModelForCausalLM

    Path("empty").mkdir()
    damaged("empty/config.json", b'{"model_type": "llama"}')
    AutoModelForCausalLM.from_pretrained("empty")


def damaged_tokenizer():
    from transformers import PreTrainedTokenizerFast

    Path("model").mkdir()
    damaged("model/tokenizer.json", b'{"added_tokens": [], "model": {"type": "BPE"}}')
    PreTrainedTokenizerFast.from_pretrained("model")


def broken_rows():
    from datasets import load_dataset

    load_dataset("json", data_files=str(damaged("a.jsonl", b'{"a": 1}\n{"a": \n')))


def no_such_hub_dataset():
    from datasets import load_dataset

    load_dataset("no/such-dataset")


def broken_table():
    import pyarrow.parquet as pq

    file = str(damaged("a.parquet"))
    pq.read_table(file)


def template_syntax():
    import jinja2

    jinja2.Template("{% if x %}\n{% endfi %}")


def hub_file():
    from huggingface_hub import hf_hub_download

    hf_hub_download("no/such-model", "config.json")


def weights_on_a_full_disk():
    from safetensors import SafetensorError

    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    raise SafetensorError(text)


def stream_of_a_full_disk():
    with Path("/dev/full").open("w") as stream:
        stream.write("a")


def json_that_is_too_deep():
    file = str(damaged("config.json", b"[" * 100_000))
    json.loads(Path(file).read_text())


def broken_yaml():
    import yaml

    with damaged("c.yaml", b"a: 1\nb: [").open() as file:
        path = file.name
        yaml.safe_load(file)
        assert path


def out_of_memory():
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def unreachable_rank():
    import torch

    raise torch.distributed.DistNetworkError("The client socket has timed out after 300000ms")


def truncated_archive():
    path = str(damaged("iter_1.pth", b"PK\x03\x04"))
    zipfile.ZipFile(path)


def truncated_gzip():
    path = str(damaged("a.json.gz", gzip.compress(b"a" * 99)[:12]))
    with gzip.open(path) as stream:
        stream.read()


def wrapped():
    try:
        full_disk()
    except OSError as error:
        raise RuntimeError("saving failed") from error


def user_error_of_a_data_loader_process():
    import torch

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, number):
            raise UserError("row 7 is broken", hint="delete it", where=Where("a.jsonl", 7))

    list(torch.utils.data.DataLoader(Rows(), num_workers=1))


KNOWN = (
    (full_disk, "/work/iter_1.pth: No space left on device"),
    (used_port, "PORT=29517"),
    (worded_by_a_library, "hub/iter_1.pth can not be found."),
    (unregistered, "did you mean 'TestAdam'?"),
    (broken_json, "tokenizer_config.json:2: this file is not valid JSON"),
    (broken_json_beside_the_file_in_view, "tokenizer.json:1: this file is not valid JSON"),
    (not_utf8, "rows.txt: this file is not UTF-8 text"),
    (damaged_weights, "model.safetensors: this weights file is damaged"),
    (no_such_model, "no/such-model is neither a folder here"),
    (model_folder_without_weights, "empty: "),
    (damaged_tokenizer, "the tokenizer cannot be loaded"),
    (broken_rows, "the data cannot be read"),
    (no_such_hub_dataset, "no/such-dataset is neither a folder here"),
    (broken_table, "a.parquet: the data cannot be read"),
    (template_syntax, "chat template fails: line 2"),
    (hub_file, "no/such-model is neither a folder here"),
    (weights_on_a_full_disk, "error: No space left on device.\nHint: free some disk space"),
    (stream_of_a_full_disk, "/dev/full: No space left on device"),
    (json_that_is_too_deep, "config.json: this file is not valid JSON"),
    (broken_yaml, "this YAML cannot be read"),
    (out_of_memory, "lower batch_size or max_length"),
    (unreachable_rank, "cannot reach each other: DistNetworkError: The client socket"),
    (truncated_archive, "iter_1.pth: this file is damaged"),
    (truncated_gzip, "Compressed file ended"),
    (wrapped, "/work/iter_1.pth: No space left on device"),
    (user_error_of_a_data_loader_process, "a.jsonl:7: row 7 is broken\nHint: delete it"),
)


def run(monkeypatch, capfd, command, *words: str) -> tuple[int, str]:
    monkeypatch.setattr(entry_point, "_dispatch", lambda words: command())
    status = entry_point.main(["train", "c.py", *words])
    return status, capfd.readouterr().err


@pytest.mark.parametrize(
    ("command", "text"), KNOWN, ids=lambda each: getattr(each, "__name__", "text")
)
def test_what_is_known_is_one_message(command, text, monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, shown = run(monkeypatch, capfd, command)
    assert status == 1
    assert text in shown
    assert "Traceback" not in shown
    # what comes before is a library's progress, where an earlier test has switched it on
    message = shown[shown.rindex("error: ") :]
    assert len([line for line in message.splitlines() if line]) <= 2


def bug():
    with activity("building the model", "work"):
        raise ValueError("shapes differ\nin a second line")


@pytest.mark.parametrize("rank", ["0", "3"])
def test_what_nobody_foresaw_is_three_lines_and_a_file(rank, monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", rank)
    Path("work").mkdir()
    status, shown = run(monkeypatch, capfd, bug)
    name = "crash.txt" if rank == "0" else "crash_rank3.txt"
    assert status == 70
    assert shown.splitlines() == [
        "error: xtuner train c.py: building the model",
        "  cause: ValueError: shapes differ",
        f"  full traceback: work/{name}",
    ]
    written = Path("work", name).read_text()
    assert "Traceback" in written and "in a second line" in written


@pytest.mark.parametrize("folder_is", ["not known", "not there"])
def test_without_a_work_dir_the_traceback_is_in_a_temporary_file(
    folder_is, monkeypatch, capfd, tmp_path
):
    def command():
        if folder_is == "not known":
            raise ValueError("boom")
        with activity("training", str(tmp_path / "gone")):
            raise ValueError("boom")

    status, shown = run(monkeypatch, capfd, command)
    assert status == 70
    written = Path(shown.splitlines()[-1].partition("full traceback: ")[2])
    assert "ValueError: boom" in written.read_text()
    written.unlink()


def test_debug_shows_all(monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, shown = run(monkeypatch, capfd, bug, "--debug")
    assert status == 70
    assert "Traceback (most recent call last)" in shown and "in a second line" in shown


def test_an_error_of_a_data_loader_process_is_told_by_its_own_line(monkeypatch, capfd):
    def command():
        message = "Caught ZeroDivisionError in DataLoader worker process 0.\nOriginal Traceback"
        raise ZeroDivisionError(f"{message} (most recent call last):\nZeroDivisionError: division")

    status, shown = run(monkeypatch, capfd, command)
    assert status == 70
    lines = shown.splitlines()
    assert lines[1] == "  cause: ZeroDivisionError: division"
    Path(lines[2].partition("full traceback: ")[2]).unlink()


def test_what_is_no_exception_is_no_traceback(monkeypatch, capfd, tmp_path):
    """As torch's CheckpointException, and a panic of tokenizers."""
    monkeypatch.chdir(tmp_path)

    class Panic(BaseException):
        """Of Rust."""

    def command():
        raise Panic("called `Option::unwrap()` on a `None` value")

    status, shown = run(monkeypatch, capfd, command)
    assert status == 70 and "Panic: called" in shown and "Traceback" not in shown


def test_a_package_that_a_class_of_transformers_needs_is_named(monkeypatch):
    from transformers.utils import import_utils

    missing = {**import_utils.BACKENDS_MAPPING}
    missing["timm"] = (lambda: False, missing["timm"][1])
    monkeypatch.setattr(import_utils, "BACKENDS_MAPPING", missing)
    with pytest.raises(ImportError) as raised:
        import_utils.requires_backends(type("TowerModel", (), {}), ["timm"])
    found = translate(raised.value)
    assert found.message == "TowerModel needs the package 'timm', which is not installed."
    assert found.hint == "pip install timm"
    assert translate(ImportError("cannot import name 'x'")) is None


@pytest.mark.parametrize(
    "text, shown",
    [
        (
            "Output 0 of _Sum is a view. This view was created inside.",
            "Output 0 of _Sum is a view",
        ),
        (
            "expected [1, 8] vs. [1, 1], e.g. rows.\nTraceback",
            "expected [1, 8] vs. [1, 1], e.g. rows.",
        ),
        ("", "RuntimeError"),
    ],
)
def test_the_first_sentence_of_an_error(text, shown):
    assert first_sentence(RuntimeError(text)) == shown


def test_a_name_that_a_module_does_not_have_is_named():
    found = translate(ImportError("Failed to import json.dump_s in None"))
    assert (found.message, found.hint) == ("'dump_s' is not in 'json'", "did you mean 'dumps'?")
