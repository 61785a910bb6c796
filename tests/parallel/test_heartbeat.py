"""Machines that fall silent are noticed; those that leave are not missed."""

import time

import pytest

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


def beating(store, limit=0.4):
    heart = Heartbeat(store, "a (rank 0)", ["b (rank 1)"], limit)
    heart._contact = time.monotonic()
    return heart


def run_for(heart, seconds):
    import threading

    thread = threading.Thread(target=heart._beat, daemon=True)
    thread.start()
    time.sleep(seconds)
    return thread


def test_a_machine_that_stops_counting_is_named():
    store = Store()
    store["xtuner/alive/b (rank 1)"] = b"7"
    heart = beating(store)
    run_for(heart, 0.2)
    assert heart.lost() is None
    time.sleep(0.5)
    assert heart.lost() == "b (rank 1)"
    heart.stop()


def test_a_machine_that_has_left_is_not_missed():
    store = Store()
    store["xtuner/alive/b (rank 1)"] = LEFT.encode()
    heart = beating(store)
    run_for(heart, 0.7)
    assert heart.lost() is None
    heart.stop()
    assert store["xtuner/alive/a (rank 0)"] == LEFT.encode()


def test_a_store_that_is_gone_ends_the_watch_and_the_leaving():
    store = Store()
    heart = beating(store)
    store.closed = True
    thread = run_for(heart, 0.3)
    assert not thread.is_alive()
    again = beating(store)
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
