"""A sample as the model sees it: trained text marked, packed rows apart, controls escaped."""

import io

from rich.console import Console

from xtuner.doctor.show import Piece, decode_tokens, print_sample, sample_html, show_sample


def decode(ids):
    return "".join(chr(token) for token in ids)


def shown(text, trained, **settings):
    ids = [ord(character) for character in text]
    labels = [token if mark == "+" else -100 for token, mark in zip(ids, trained, strict=True)]
    return show_sample("a sample", ids, labels, decode, **settings)


def test_a_packed_sample_is_cut_at_its_boundaries_and_where_training_begins():
    found = shown("abcdef", "--++-+", cu_seqlens=[0, 4, 6], sources=["x:1"])
    first, second = found.rows
    assert first.segments == [Piece("ab", False), Piece("cd", True)]
    assert second.segments == [Piece("e", False), Piece("f", True)]
    assert (first.source, first.tokens, first.trained) == ("x:1", 4, 2)
    assert (second.source, second.tokens, second.trained) == ("", 2, 1)


def test_images_take_the_place_of_their_tokens():
    assert decode_tokens([ord("a"), -200, -200, ord("b")], decode) == "a<image><image>b"


def test_in_a_pipe_trained_text_stands_in_brackets_and_controls_are_escaped():
    out = io.StringIO()
    print_sample(shown("ab\x1b", "-++"), Console(file=out))
    assert "a[[b\\u001b]]" in out.getvalue()


def test_the_page_escapes_the_text():
    page = sample_html(shown("<b>", "-+-", sources=["<x>:1"]))
    assert "&lt;</span>" in page and '<span class="trained">b</span>' in page
    assert "&lt;x&gt;:1 · 3 tokens, 1 trained" in page
