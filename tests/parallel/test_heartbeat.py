"""Machines that fall silent are noticed; those that leave are not missed."""

from types import SimpleNamespace

import pytest

from xtuner.parallel import heartbeat
from xtuner.parallel.heartbeat import LEFT, LIMIT, Heartbeat, is_wanted


class Store(dict):
    """A store in this process; ``closed`` when the machine that has it is gone."""

    closed = False

    def set(self, key, value):
        if self.closed:
            raise RuntimeError("Broken pipe")
        self[key] = value.encode()

    def get(self, key, *default):
        return self[key]

    def check(self, keys):
        if self.closed:
            raise RuntimeError("Broken pipe")
        return all(key in self for key in keys)


class Time:
    """A clock that goes on when somebody waits, and wakes them until a time."""

    def __init__(self):
        self.now = self.until = 0.0
        self.stopped = False

    def wait(self, seconds):
        self.now += seconds
        return self.stopped or self.now > self.until

    def set(self):
        self.stopped = True

    def is_set(self):
        return self.stopped


@pytest.fixture
def clock(monkeypatch):
    clock = Time()
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def beating(store, clock):
    names = "a (rank 0)", ["b (rank 1)"]
    return Heartbeat(store, *names, limit=8.0, _contact=clock.now, _stopped=clock)


def run_for(heart, clock, seconds):
    clock.until = clock.now + seconds
    heart._beat()


def test_a_machine_that_stops_counting_is_named(clock):
    store = Store()
    store["xtuner/alive/b (rank 1)"] = b"7"
    heart = beating(store, clock)
    run_for(heart, clock, 4)
    assert heart.lost() is None
    run_for(heart, clock, 8)
    assert heart.lost() == "b (rank 1)"


def test_a_machine_that_has_left_is_not_missed(clock):
    store = Store()
    store["xtuner/alive/b (rank 1)"] = LEFT.encode()
    heart = beating(store, clock)
    run_for(heart, clock, 20)
    assert heart.lost() is None
    heart.stop()
    assert store["xtuner/alive/a (rank 0)"] == LEFT.encode()


def test_a_machine_that_hears_from_no_store_misses_the_first(clock):
    heart = beating(Store(), clock)
    clock.now += 9
    assert heart.lost() == "the first machine"


def test_a_store_that_is_gone_ends_the_watch_and_the_leaving(clock):
    store = Store()
    heart = beating(store, clock)
    store.closed = True
    run_for(heart, clock, 20)
    assert clock.stopped and clock.now < 20
    clock.stopped = False
    again = beating(store, clock)
    again.stop()  # says nothing: there is nobody to tell
    assert again._stopped.is_set()


@pytest.mark.parametrize(
    ("backend", "limit", "wanted"),
    [
        ("gloo", None, True),
        ("nccl", None, False),
        ("cpu:gloo,cuda:nccl", None, False),
        ("nccl", "", False),
        ("nccl", "60", True),
    ],
)
def test_nccl_has_a_watchdog_of_its_own(backend, limit, wanted, monkeypatch):
    monkeypatch.delenv(LIMIT, raising=False)
    if limit is not None:
        monkeypatch.setenv(LIMIT, limit)
    assert is_wanted(backend) == wanted
