"""Which files and map functions a dataset's settings stand for."""

import json

import pytest
from datasets import load_dataset

from xtuner.dataset import ConcatDataset, LLaVADataset, MOSSSFTDataset, process_hf_dataset
from xtuner.dataset.map_fns import alpaca_map_fn
from xtuner.dataset.preference_dataset import build_preference_dataset, load_jsonl_dataset
from xtuner.dataset.sources import local_files
from xtuner.doctor.layouts import BY_MAP_FN, LAYOUTS
from xtuner.doctor.parts import find_parts
from xtuner.utils.errors import UserError


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n{"a": 2}\n')
    return str(file)


def text(source, **settings):
    return dict(type=process_hf_dataset, dataset=source, **settings)


def json_source(file, **settings):
    return dict(type=load_dataset, path="json", data_files=dict(train=file), **settings)


def values(part):
    return [row.value for row in part.rows()]


def test_files_map_function_and_layout_of_a_text_dataset(file):
    (part,) = find_parts(text(json_source(file), dataset_map_fn=alpaca_map_fn))
    assert (part.name, part.map_fn) == (file, None)
    assert part.layout is BY_MAP_FN["alpaca_map_fn"]
    assert values(part) == values(part) == [{"a": 1}, {"a": 2}]  # anew at each call


def test_a_function_of_the_users_own_has_no_layout(file):
    def own(row):
        return row

    (part,) = find_parts(text(json_source(file), dataset_map_fn=own))
    assert (part.map_fn, part.layout) == (own, None)
    with pytest.raises(UserError, match="no map function 'gone'"):
        find_parts(text(json_source(file), dataset_map_fn="gone"))


def test_joined_and_preference_datasets(file):
    pairs = dict(type=build_preference_dataset, dataset=dict(type=load_jsonl_dataset,
                                                             data_files=[file]))  # fmt: skip
    parts = find_parts(dict(type=ConcatDataset, datasets=[text(json_source(file)), pairs]))
    assert [part.layout.name for part in parts] == ["xtuner", "preference"]


def test_images_each_file_with_its_folder_and_rows_of_their_own_kind(file):
    (part,) = find_parts(dict(type=LLaVADataset, data_path=file, image_folder="img"))
    assert (part.layout, part.image_folder) == (LAYOUTS["llava"], "img")
    (part,) = find_parts(dict(type=MOSSSFTDataset, data_file=file))
    assert (part.layout, values(part)) == (None, [{"a": 1}, {"a": 2}])


def test_a_field_of_one_object_holds_the_rows(tmp_path):
    file = tmp_path / "wrapped.json"
    file.write_text(json.dumps({"version": 1, "data": [{"a": 1}]}))
    (part,) = find_parts(text(json_source(str(file), field="data")))
    assert values(part) == [{"a": 1}]


def test_rows_of_any_iterable(file):
    (part,) = find_parts(text([{"a": 5}]))
    assert values(part) == [{"a": 5}]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (dict(type=load_dataset, path="json"), "has no data_files"),
        (dict(type=load_dataset, path="json", data_files="x.csv"), "cannot read a .csv file"),
        (dict(type=load_dataset, path="json", data_files="gone.json"), "no data file"),
    ],
)
def test_sources_that_cannot_be_read_are_refused(source, message):
    with pytest.raises(UserError, match=message):
        find_parts(text(source))
    with pytest.raises(UserError, match="has no 'dataset'"):
        find_parts(dict(type=process_hf_dataset))


def test_files_of_the_hub_are_not_local():
    assert local_files(dict(type=load_dataset, path="org/name")) is None
    remote = dict(type=load_dataset, path="json", data_files="https://x.org/a.json")
    assert local_files(remote) is None
