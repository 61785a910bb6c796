"""Another run's config, data, packages or number of processes is refused, or allowed by name."""

import json

import pytest

from tests.helpers.tiny import make_tokenizer
from xtuner.checkpoint.fingerprint import changes, fingerprints, refuse_changes
from xtuner.utils.errors import UserError

CONFIG = {
    "lr": 1e-4,
    "work_dir": "a",
    "model": {"type": UserError, "llm": {"name": "tiny"}},
    "train_dataloader": {"batch_size": 1, "num_workers": 0},
    "optim_wrapper": {"optimizer": {"lr": 1e-4, "betas": (0.9, 0.999)}},
    "param_scheduler": [{"type": "LinearLR", "end": 0.1}, {"type": "Cosine", "end": 3}],
    "train_cfg": {"max_epochs": 3},
    "default_hooks": {"logger": {"interval": 10}},
}


ROWS = [{"input_ids": [i, 2, 3], "labels": [-100, 2, 3]} for i in range(10)]


def changed(**values):
    config = json.loads(json.dumps(CONFIG, default=str)) | {"model": CONFIG["model"]}
    config["optim_wrapper"]["optimizer"]["betas"] = (0.9, 0.999)
    for path, value in values.items():
        *outer, last = path.split("__")
        place = config
        for key in outer:
            place = place[int(key) if key.isdigit() else key]
        place[last] = value
    return config


def kinds(before, now):
    return [change.kind for change in changes(before, now) if not change.harmless]


def test_the_same_run_has_not_changed():
    assert changes(fingerprints(config=CONFIG), fingerprints(config=changed())) == []


@pytest.mark.parametrize(
    "harmless",
    [
        {"work_dir": "b"},
        {"default_hooks__logger": {"interval": 1}},
        {"train_dataloader__num_workers": 4},
    ],
)
def test_where_and_what_is_shown_does_not_matter(harmless):
    assert changes(fingerprints(config=CONFIG), fingerprints(config=changed(**harmless))) == []


def test_longer_training_is_told_and_gone_along_with():
    now = fingerprints(config=changed(train_cfg__max_epochs=5, param_scheduler__1__end=5))
    found = changes(fingerprints(config=CONFIG), now)
    said = refuse_changes(found, (), "iter_4.pth")
    assert any("train_cfg.max_epochs: 3 -> 5" in line for line in said)
    moved = fingerprints(config=changed(param_scheduler__1__end=5))  # the schedule alone
    with pytest.raises(UserError, match=r"param_scheduler\.1\.end: 3 -> 5"):
        refuse_changes(changes(fingerprints(config=CONFIG), moved), (), "iter_4.pth")


def test_all_changes_are_listed_at_once_and_can_be_allowed():
    tokenizer = make_tokenizer()
    before = fingerprints(config=CONFIG, dataset=ROWS, tokenizer=tokenizer, world_size=1)
    before["packages"]["torch"] = "2.0"
    tokenizer.add_tokens(["<new>"])
    now = fingerprints(
        config=changed(optim_wrapper__optimizer__lr=2e-4),
        dataset=ROWS[:-1],
        tokenizer=tokenizer,
        world_size=2,
    )
    found = changes(before, now)
    assert sorted(kinds(before, now)) == ["config", "data", "packages", "tokenizer", "world_size"]
    with pytest.raises(UserError) as caught:
        refuse_changes(found, {"data"}, "iter_4.pth")
    text = str(caught.value)
    for part in ("optimizer.lr: 0.0001 -> 0.0002", "torch: 2.0 -> ", "world_size: 1 -> 2"):
        assert part in text
    assert "--resume-allow config,packages,tokenizer,world_size" in text
    assert len(refuse_changes(found, {"all"}, "iter_4.pth")) == len(found)


def test_other_tokens_or_labels_in_as_many_rows_are_noticed():
    before = fingerprints(config={}, dataset=ROWS)
    other = [*ROWS[:9], {"input_ids": [9, 2, 3], "labels": [-100, -100, 3]}]
    assert kinds(before, fingerprints(config={}, dataset=other)) == ["data"]
    assert kinds(before, fingerprints(config={}, dataset=list(ROWS))) == []


def test_an_unknown_word_of_resume_allow_is_refused():
    with pytest.raises(UserError, match="does not know datas") as caught:
        refuse_changes([], {"datas"}, "iter_4.pth")
    assert caught.value.hint == "--resume-allow config,data,tokenizer,packages,world_size"


def test_other_values_in_any_column_are_noticed():
    """Pairs of answers have no column called input_ids."""
    pairs = [{"chosen_ids": [n, 2], "rejected_ids": [n, 3]} for n in range(10)]
    other = [{**pair, "rejected_ids": [pair["rejected_ids"][0], 4]} for pair in pairs]
    assert kinds(
        fingerprints(config={}, dataset=pairs), fingerprints(config={}, dataset=other)
    ) == ["data"]


def test_a_checkpoint_with_another_checksum_of_its_rows_is_compared_by_their_number():
    """Earlier versions looked at tokens and labels alone."""
    now = fingerprints(config={}, dataset=ROWS)
    before = {**now, "data": {"rows": 10, "sample": "of another kind"}}
    assert kinds(before, now) == []
    assert kinds({**before, "data": {"rows": 9, "sample": ""}}, now) == ["data"]
