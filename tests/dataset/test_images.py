"""Images of 16 bits are scaled, and bombs are refused before they are decoded."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from xtuner.dataset.images import decode_base64_to_image, load_image, problems_of


def test_16_bits_are_scaled(tmp_path):
    file = tmp_path / "deep.png"
    values = np.array([[0, 40000], [257, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(file)
    expected = [[0, 156], [1, 255]]
    text = base64.b64encode(file.read_bytes()).decode()
    for image in (load_image(file), decode_base64_to_image(text)):
        assert image.mode == "RGB"
        assert np.asarray(image)[..., 0].tolist() == expected


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    file = tmp_path / "bomb.png"
    Image.new("1", (12_000, 12_000)).save(file)
    assert file.stat().st_size < 500_000
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it is decoded"))
    with pytest.raises(OSError, match="12,000 x 12,000 pixels"):
        load_image(file)
    with pytest.raises(OSError, match="pixels"):
        decode_base64_to_image(base64.b64encode(file.read_bytes()).decode())
    assert problems_of([file]) == ["has too many pixels"]


def test_eight_bits_stay_as_they_are(tmp_path):
    values = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    (tmp_path / "a.png").write_bytes(stream.getvalue())
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.png")), values)
