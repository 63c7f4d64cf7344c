"""The queue of runs: places, turns, refusals, abandoned runs, and additional places."""

import threading
import time
from collections.abc import Iterator

import pytest

from bridge_server.serving import run_queue
from bridge_server.serving.run_queue import Abandoned, Client, RunQueue
from bridge_wire.errors import WorkerBusy
from tests.conftest import eventually


def _waits() -> bool:
    return False


@pytest.fixture(autouse=True)
def busy_processor(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """A processor that idles only where a test says so."""
    idles = [False]
    monkeypatch.setattr(run_queue._Processor, "has_idled", lambda self: idles[0])
    yield idles


class Runs:
    """Runs of clients that begin, and end when a test says so."""

    def __init__(self, queue: RunQueue) -> None:
        self.queue = queue
        self.begun: list[str] = []
        self.errors: list[Exception] = []
        self._ends: list[tuple[threading.Thread, threading.Event]] = []
        self._threads: list[threading.Thread] = []

    def add(self, client: Client, name: str) -> None:
        """A run in a thread of its own; returns when it has begun, waits or was refused."""
        seen = self.queue.waiting, len(self.begun), len(self.errors)
        end = threading.Event()
        thread = threading.Thread(target=self._run, args=(client, name, end))
        self._threads.append(thread)
        thread.start()
        assert eventually(
            lambda: seen != (self.queue.waiting, len(self.begun), len(self.errors))
        )

    def _run(self, client: Client, name: str, end: threading.Event) -> None:
        try:
            self.queue.enter(client, _waits)
        except WorkerBusy as error:
            self.errors.append(error)
            return
        self._ends.append((threading.current_thread(), end))
        self.begun.append(name)
        end.wait()
        self.queue.leave(client)

    def end_one(self) -> None:
        """End the run that began first, and wait for what begins in its place."""
        thread, end = self._ends.pop(0)
        end.set()
        thread.join()
        assert eventually(
            lambda: (
                self.queue.waiting + len(self.begun) + len(self.errors)
                == len(self._threads)
            )
        )

    def finish(self) -> None:
        while any(thread.is_alive() for thread in self._threads):
            while self._ends:
                self._ends.pop(0)[1].set()
            time.sleep(0.001)
        assert (self.queue.running, self.queue.waiting) == (0, 0)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runs]:
    monkeypatch.setattr(run_queue, "usable_cores", lambda: 2)
    runs = Runs(RunQueue(None, 10))
    yield runs
    runs.finish()


def test_the_last_place_is_for_another_client(runs: Runs) -> None:
    greedy, other = Client(), Client()
    for i in range(4):
        runs.add(greedy, f"greedy {i}")
    assert runs.begun == ["greedy 0", "greedy 1"]
    runs.add(other, "other 0")
    assert runs.begun[2:] == ["other 0"]


def test_clients_take_turns_whatever_they_have_waiting(runs: Runs) -> None:
    a, b, c = Client(), Client(), Client()
    for i in range(5):
        runs.add(a, f"a{i}")
    for i in range(3):
        runs.add(b, f"b{i}")
    runs.add(c, "c0")
    assert runs.begun == ["a0", "a1", "b0"]
    for _ in range(6):
        runs.end_one()
    # c has no run under way, so its first one comes before the others' next ones.
    assert runs.begun[3:] == ["c0", "a2", "b1", "a3", "b2"]


def test_one_place_is_everybodys() -> None:
    runs = Runs(RunQueue(1, 10))
    a, b = Client(), Client()
    for name in ("a0", "a1"):
        runs.add(a, name)
    runs.add(b, "b0")
    assert runs.begun == ["a0"]
    runs.end_one()
    assert runs.begun == ["a0", "a1"]
    runs.end_one()
    assert runs.begun == ["a0", "a1", "b0"]
    runs.finish()


def test_past_the_limit_a_run_is_refused(runs: Runs) -> None:
    client = Client()
    for i in range(12):
        runs.add(client, str(i))
    assert not runs.errors
    runs.add(client, "too many")
    assert "10 calls wait for the worker already" in str(runs.errors[0])
    assert runs.errors[0].retry_after_s >= 0
    runs.end_one()
    runs.add(client, "one more")
    assert len(runs.errors) == 1


def test_an_abandoned_run_leaves_the_queue(runs: Runs) -> None:
    client = Client()
    for i in range(2):
        runs.add(client, str(i))
    with pytest.raises(Abandoned):
        runs.queue.enter(client, lambda: True)
    assert runs.queue.waiting == 0
    runs.end_one()
    runs.add(client, "next")
    assert runs.begun[-1] == "next"


def test_places_are_added_while_the_processor_idles(
    runs: Runs, busy_processor: list[bool]
) -> None:
    """So that runs that wait for each other all begin."""
    client = Client()
    for i in range(8):
        runs.add(client, str(i))
    time.sleep(0.2)
    assert len(runs.begun) == 2
    busy_processor[0] = True
    assert eventually(lambda: len(runs.begun) == 8)


def test_there_is_a_limit_to_the_places_added(busy_processor: list[bool]) -> None:
    """One place is still kept for another client."""
    busy_processor[0] = True
    runs = Runs(RunQueue(None, 100))
    client, other = Client(), Client()
    for i in range(50):
        runs.add(client, str(i))
    assert eventually(lambda: len(runs.begun) >= 31)
    time.sleep(0.3)
    assert len(runs.begun) == 31
    runs.add(other, "other")
    assert runs.begun[-1] == "other"
    runs.finish()


@pytest.mark.parametrize(
    "queue", [RunQueue(2, 100), RunQueue(None, 100, may_grow=False)]
)
def test_a_number_that_was_asked_for_is_a_limit(
    queue: RunQueue, busy_processor: list[bool]
) -> None:
    """And so is any on a GPU."""
    busy_processor[0] = True
    runs = Runs(queue)
    client = Client()
    for i in range(10):
        runs.add(client, str(i))
    time.sleep(0.5)
    assert len(runs.begun) == queue.most - 1
    runs.finish()


def test_runs_that_wait_for_runs_that_wait_all_end(
    busy_processor: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A callback may call this worker again, in any number and depth."""
    monkeypatch.setattr(run_queue, "_STANDSTILL_TICKS", 2)
    busy_processor[0] = True
    queue, done = RunQueue(None, 1000), []

    def nested(clients: list[Client]) -> None:
        queue.enter(clients[0], _waits)
        if clients[1:]:
            nested(clients[1:])
        queue.leave(clients[0])
        done.append(clients)

    inner = [Client(), Client()]
    threads = [
        threading.Thread(target=nested, args=([Client(), *inner],)) for _ in range(40)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 120
    assert (queue.running, queue.waiting) == (0, 0)


def test_a_system_without_threads_leaves_the_queue_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    queue, client = RunQueue(1, 10), Client()
    queue.enter(client, _waits)

    def fail(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError):
            queue.enter(client, _waits)
    queue.leave(client)
    assert (queue.running, queue.waiting) == (0, 0)
    queue.enter(client, _waits)
    queue.leave(client)


def test_a_client_that_cannot_be_asked_leaves_no_run(runs: Runs) -> None:
    client = Client()
    for i in range(2):
        runs.add(client, str(i))

    def fail() -> bool:
        raise OSError("the connection is broken")

    with pytest.raises(OSError, match="broken"):
        runs.queue.enter(client, fail)
    assert runs.queue.waiting == 0


def test_a_process_that_waits_has_an_idle_processor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    processor = run_queue._Processor()
    time.sleep(0.2)
    assert processor.has_idled()
