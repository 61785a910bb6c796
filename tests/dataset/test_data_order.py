"""The files of a folder: sorted, or in the order that a file lists."""

import pytest

from xtuner.dataset.data_order import files_in_order, find_by_suffix
from xtuner.utils.errors import UserError


def names(files, folder):
    return [file.relative_to(folder).as_posix() for file in files]


@pytest.fixture
def folder(tmp_path):
    for name in ("b.json", "sub/a.json", "c.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def order_of(folder, *lines):
    file = folder / "data_order.txt"
    file.write_text("\n".join(lines) + "\n", "utf-8")
    return file


def test_files_are_sorted_or_in_the_order_that_is_written_down(folder):
    assert names(find_by_suffix(folder, ".json"), folder) == ["b.json", "sub/a.json"]
    order = order_of(folder, "sub/a.json", " b.json ", "")
    assert names(files_in_order(folder, ".json", order), folder) == ["sub/a.json", "b.json"]


def test_a_name_may_hold_characters_at_which_splitlines_splits(folder):
    (folder / "d\u2028e.json").touch()
    listed = files_in_order(folder, ".json", order_of(folder, "d\u2028e.json"))
    assert names(listed, folder) == ["d\u2028e.json"]


def test_a_listed_file_that_is_missing_is_named(folder):
    with pytest.raises(UserError, match=r"1 are missing \(gone\.json\)"):
        files_in_order(folder, ".json", order_of(folder, "gone.json"))
    with pytest.raises(UserError, match=r"\*\.bin"):
        files_in_order(folder, ".bin")
    with pytest.raises(UserError, match="cannot be read"):
        files_in_order(folder, ".json", folder / "no_such_order.txt")


def test_a_file_that_is_not_listed_is_refused_where_all_must_be(folder):
    order = order_of(folder, "b.json")
    assert names(files_in_order(folder, ".json", order), folder) == ["b.json"]
    with pytest.raises(UserError, match="1 of the folder are not named"):
        files_in_order(folder, ".json", order, all_listed=True)
