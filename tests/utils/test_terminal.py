"""Text for a terminal: columns of Chinese characters, and where a line may break."""

from __future__ import annotations

from xtuner.utils.terminal import padded, width, wrapped

WORD, COMMA, BRACKET = "\u8bad\u7ec3", "\uff0c", "\uff08"


def test_a_chinese_character_takes_two_columns():
    assert width("loss") == 4 and width(WORD) == 4
    assert padded(WORD, 6) == WORD + "  " and padded("loss", 3) == "loss"


def test_lines_break_between_characters_but_not_inside_a_word():
    text = f"{WORD * 3}world_size{WORD}"
    lines = wrapped(text, 16)
    assert lines == [WORD * 3, f"world_size{WORD}"]
    assert all(width(line) <= 16 for line in lines)


def test_punctuation_stays_with_what_it_belongs_to():
    assert wrapped(f"{WORD}{COMMA}{WORD}", 4) == [WORD[0], WORD[1] + COMMA, WORD]
    assert wrapped(f"{WORD}{BRACKET}{WORD}", 6) == [WORD, BRACKET + WORD]


def test_a_word_that_is_too_long_has_a_line_of_its_own():
    assert wrapped("a " + "b" * 9 + " c", 4) == ["a", "b" * 9, "c"]
    assert wrapped("", 4) == [""]
