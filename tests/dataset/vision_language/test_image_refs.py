"""What a row gives as an image, and where it is."""

import base64
import io
import urllib.request

import pytest

from tests.helpers.image_text import make_image
from xtuner.dataset.images import read_size
from xtuner.dataset.vision_language import image_refs
from xtuner.dataset.vision_language.image_refs import image_ref
from xtuner.utils.errors import BadRowError


def encoded():
    stream = io.BytesIO()
    make_image(12, 10, 0).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def web(monkeypatch, tmp_path):
    """The addresses that are asked for; each answers with an image."""
    monkeypatch.setenv("XTUNER_CACHE", str(tmp_path / "cache"))
    asked = []

    def urlopen(address, timeout):
        asked.append(address)
        return io.BytesIO(encoded())

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return asked


def test_an_address_is_downloaded_once(web, tmp_path):
    ref = image_ref({"url": "https://example.com/a.png"})
    file = ref.file(tmp_path)
    assert read_size(file) == (12, 10) and tmp_path / "cache" in file.parents
    assert image_ref("https://example.com/a.png").file(tmp_path) == file
    assert web == ["https://example.com/a.png"]


def test_a_download_has_a_limit(web, tmp_path, monkeypatch):
    monkeypatch.setattr(image_refs, "LARGEST_DOWNLOAD", 10)
    with pytest.raises(OSError, match="more than 10 bytes"):
        image_ref("http://example.com/b.png").file(tmp_path)


def test_places_of_files(tmp_path):
    assert image_ref("a/b.png").file(tmp_path) == tmp_path / "a" / "b.png"
    assert image_ref("a/../b.png").file(tmp_path) == tmp_path / "a/../b.png"
    absolute = str(tmp_path / "c.png")
    assert image_ref(absolute).file(tmp_path / "other") == tmp_path / "c.png"
    assert image_ref("file:///x/a%20b.png").file(tmp_path).as_posix() == "/x/a b.png"
    with pytest.raises(BadRowError, match="outside image_folder"):
        image_ref("../a.png").file(tmp_path)


def test_base64_in_lines_and_names_that_look_like_it(tmp_path):
    text = base64.encodebytes(encoded()).decode()
    assert image_ref(text).data == encoded()
    long_name = "R0lGOD/" + "a" * 70 + ".png"  # begins like a GIF in base64
    assert image_ref(long_name).place == long_name


def test_names_of_images_in_memory():
    assert str(image_ref({"bytes": b"123", "path": "a.png"})) == "a.png"
    assert "3" in str(image_ref(b"123"))
