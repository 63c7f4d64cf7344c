"""Many calls at once: turns between clients, refusals, and calls that nobody waits for any more."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from bridge_client import connect
from bridge_client.cli import main
from bridge_client.torch import RemoteJaxFunction
from bridge_wire.errors import CallTimeout, WorkerBusy
from tests.conftest import eventually
from tests.workers import Worker, serving

_MODEL = """
import os
import pathlib
import time

import jax
import numpy as np

HERE = pathlib.Path(__file__).parent
_N = iter(range(10**9))


def _blocked(x):
    (HERE / f"began{next(_N)}").touch()
    while not (HERE / "go").exists():
        time.sleep(0.01)
    return 2 * np.asarray(x)


def blocked(x):
    return jax.pure_callback(_blocked, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def fast(x):
    return x + 1


def hosted(x):
    # Arrays of this size need the runtime's own threads for the callback.
    return jax.pure_callback(
        lambda x: 2 * x, jax.ShapeDtypeStruct(x.shape, x.dtype), x
    )
"""


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """Starts the worker of these models, with flags."""
    (tmp_path / "many_models.py").write_text(_MODEL)
    models = [f"--jax-model=many_models:{m}" for m in ("blocked", "fast", "hosted")]
    entered = []

    def start(*flags: str) -> Worker:
        listen = f"--listen=unix:{tmp_path}/worker.sock"
        context = serving(
            tmp_path, listen, *models, *flags, env={"PYTHONPATH": str(tmp_path)}
        )
        entered.append(context)
        return context.__enter__()

    yield start
    (tmp_path / "go").touch()
    for context in entered:
        context.__exit__(None, None, None)


def _begun(directory: Path) -> int:
    return len(list(directory.glob("began*")))


def _waiting(address: str, capsys: pytest.CaptureFixture[str]) -> int:
    """The runs that wait for their turn on a worker."""
    capsys.readouterr()
    assert main(["top", address, "--once", "--json"]) == 0
    return int(json.loads(capsys.readouterr().out).get("waiting", 0))


def _all_at_once(
    calls: int, call: Callable[[], object]
) -> Callable[[], Counter[object]]:
    """Make calls in as many threads; return a function that waits for them and counts results."""
    seen: Counter[object] = Counter()

    def once() -> None:
        try:
            seen[call()] += 1
        except Exception as error:
            seen[type(error)] += 1

    threads = [threading.Thread(target=once) for _ in range(calls)]
    for thread in threads:
        thread.start()

    def wait() -> Counter[object]:
        for thread in threads:
            thread.join()
        return seen

    return wait


def test_another_clients_call_passes_forty_that_do_not_end(
    serve: Callable[..., Worker], tmp_path: Path, lane: str
) -> None:
    address = serve().address
    with connect(address, lane=lane) as greedy, connect(address, lane=lane) as other:
        blocked = RemoteJaxFunction(greedy, name="blocked")
        fast = RemoteJaxFunction(other, name="fast")
        x = torch.ones(3)
        wait = _all_at_once(40, lambda: tuple(blocked(x).tolist()))
        assert eventually(lambda: _begun(tmp_path) >= 2, 30)
        for _ in range(20):
            assert fast(x).tolist() == [2, 2, 2]
        (tmp_path / "go").touch()
        assert wait() == {(2, 2, 2): 40}


def test_two_hundred_calls_at_once_leave_a_worker_that_answers(
    serve: Callable[..., Worker], lane: str
) -> None:
    """XLA's runtime stops for ever where so many host callbacks are under way."""
    address = serve().address
    with connect(address, lane=lane) as session:
        hosted = RemoteJaxFunction(session, name="hosted")
        x = torch.arange(300_000.0)
        hosted(x)
        wait = _all_at_once(200, lambda: bool((hosted(x) == 2 * x).all()))
        assert wait() == {True: 200}
        assert RemoteJaxFunction(session, name="fast")(x)[1] == 2


def test_past_the_limit_calls_are_refused_or_wait_for_room(
    serve: Callable[..., Worker], tmp_path: Path, lane: str
) -> None:
    address = serve("--max-runs=1", "--max-waiting=2").address
    x = torch.ones(2)
    with connect(address, lane=lane, retry_s=0) as hasty, connect(address) as patient:
        blocked = RemoteJaxFunction(hasty, name="blocked")
        prepared = RemoteJaxFunction(patient, name="fast")
        waiting = _all_at_once(40, lambda: tuple(blocked(x).tolist()))
        assert eventually(lambda: _begun(tmp_path) >= 1, 30)
        later = _all_at_once(3, lambda: tuple(prepared(x).tolist()))
        (tmp_path / "go").touch()
        seen = waiting()
        assert set(seen) <= {(2, 2), WorkerBusy}
        assert sum(seen.values()) == 40
        assert later() == {(2, 2): 3}


def test_a_call_that_nobody_waits_for_any_more_is_not_run(
    serve: Callable[..., Worker],
    tmp_path: Path,
    lane: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its blocks are free again at once."""
    address = serve("--max-runs=2").address
    x = torch.ones(2)
    with connect(address, lane=lane) as first, connect(address, lane=lane) as other:
        functions = [RemoteJaxFunction(each, name="blocked") for each in (first, other)]
        hasty = RemoteJaxFunction(first, name="blocked", timeout_s=0.5)
        # Both places are taken: one of them is for a client without a run.
        waits = [_all_at_once(1, lambda f=f: tuple(f(x).tolist())) for f in functions]
        assert eventually(lambda: _begun(tmp_path) == 2, 30)
        with pytest.raises(CallTimeout):
            hasty(x)
        assert eventually(lambda: _waiting(address, capsys) == 0)
        (tmp_path / "go").touch()
        for wait in waits:
            assert wait() == {(2, 2): 1}
        assert _begun(tmp_path) == 2
        assert eventually(lambda: first.stats()["blocks"] == 0)
