"""Sizes of image files are read once, and again where the file has changed."""

import os

import pytest

from tests.helpers.image_text import make_image
from xtuner.dataset.prepare.cache import cache_folder
from xtuner.dataset.vision_language import size_cache
from xtuner.dataset.vision_language.size_cache import FILE, measure_files, remember


@pytest.fixture
def reads(monkeypatch, tmp_path):
    """The files whose headers are read; the cache is a new one."""
    monkeypatch.setenv("XTUNER_CACHE", str(tmp_path / "cache"))
    read, own = [], size_cache.read_size
    monkeypatch.setattr(size_cache, "read_size", lambda file: read.append(file.name) or own(file))
    return read


def photo(folder, name, size):
    make_image(*size, 0).save(folder / name)
    return folder / name


def test_headers_are_read_once(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(size_cache, "AT_ONCE", 7)
    files = [photo(tmp_path, f"{n}.png", (20 + n, 30)) for n in range(30)]
    missing = tmp_path / "missing.png"
    sizes, problems, new = measure_files([*files, files[0], missing])
    assert sizes == {file: (20 + n, 30) for n, file in enumerate(files)}
    assert list(problems) == [missing] and len(new) == 30 and len(reads) == 30
    remember(new)
    reads.clear()
    assert measure_files(files) == (sizes, {}, {}) and not reads


def test_a_changed_file_is_read_again(tmp_path, reads):
    file = photo(tmp_path, "a.png", (20, 30))
    remember(measure_files([file])[2])
    state = file.stat()
    photo(tmp_path, "a.png", (40, 30))
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 1_000_000))
    reads.clear()
    sizes, _, new = measure_files([file])
    assert sizes == {file: (40, 30)} and reads == ["a.png"] and list(new) == [file]
    remember(new)
    assert measure_files([file]) == (sizes, {}, {})


def test_a_broken_cache_costs_time_only(tmp_path, reads):
    file = photo(tmp_path, "a.png", (20, 30))
    cache_folder().mkdir(parents=True)
    (cache_folder() / FILE).write_bytes(b"no database" * 100)
    for _ in range(2):
        sizes, _, new = measure_files([file])
        assert sizes == {file: (20, 30)}
        remember(new)
    reads.clear()
    assert measure_files([file])[0] == sizes and not reads
