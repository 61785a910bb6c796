"""Numbers that people set in the environment."""

import pytest

from xtuner.utils.environment import positive
from xtuner.utils.errors import UserError


@pytest.mark.parametrize(("text", "number"), [("2.5", 2.5), ("", 60.0), (None, 60.0)])
def test_a_number_is_read(monkeypatch, text, number):
    monkeypatch.delenv("XTUNER_X", raising=False)
    if text is not None:
        monkeypatch.setenv("XTUNER_X", text)
    assert positive("XTUNER_X", 60.0) == number


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_anything_else_is_named(monkeypatch, text):
    monkeypatch.setenv("XTUNER_X", text)
    with pytest.raises(UserError, match=f"XTUNER_X={text} is not a number above 0"):
        positive("XTUNER_X", 60.0)
