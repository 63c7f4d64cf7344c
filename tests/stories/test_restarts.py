"""Restarts without a word: drains, successors, repeated calls, revisions, and how a worker died."""

import contextlib
import gc
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bridge_client import connect, spawn
from bridge_client.remote import link
from bridge_client.remote.session import RemoteSession
from bridge_client.torch import RemoteJaxFunction
from bridge_wire.errors import (
    CallerError,
    ModelChanged,
    WorkerCrashed,
    WorkerDied,
    WorkerUnavailable,
)
from tests.conftest import eventually, python_of
from tests.workers import Worker

_MODEL = """
import os
import signal
import time

import jax
import numpy as np


def damped(x, w):
    return jax.numpy.sin(x @ w)


def _slow(x):
    time.sleep(0.4)
    return x


def slow(x):
    return jax.pure_callback(_slow, jax.ShapeDtypeStruct(x.shape, x.dtype), 2 * x)


def _die_once(x):
    mark = os.environ["MARK"]
    if not os.path.exists(mark):
        open(mark, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def mortal(x):
    return jax.pure_callback(_die_once, jax.ShapeDtypeStruct(x.shape, x.dtype), 3 * x)


def deadly(x):
    return jax.pure_callback(
        lambda x: os.kill(os.getpid(), signal.SIGKILL),
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        x,
    )
"""
_NAMES = ("damped", "slow", "mortal", "deadly")


class Rolling:
    """A worker that is replaced by another one at the same address."""

    def __init__(self, directory: Path, lane: str) -> None:
        (directory / "restarted_models.py").write_text(_MODEL)
        self._directory = directory
        self._address = (
            f"unix:{directory}/worker.sock" if lane == "local" else "127.0.0.1:0"
        )
        self._count = 0
        self.flags: list[str] = []
        self.worker = self._started().wait_until_ready()

    @property
    def address(self) -> str:
        return self.worker.address

    def _started(self) -> Worker:
        self._count += 1
        models = [f"--jax-model=restarted_models:{name}" for name in _NAMES]
        return Worker(
            self._directory / str(self._count),
            "--listen",
            self._address,
            *models,
            *self.flags,
            env={
                "PYTHONPATH": f"{self._directory}:{os.environ.get('PYTHONPATH', '')}",
                "MARK": f"{self._directory}/mark",
            },
        )

    def stop(self, number: int = signal.SIGTERM) -> None:
        self._address = self.worker.address  # a port that was free stays this worker's
        self.worker.process.send_signal(number)
        self.worker.wait()

    def start(self) -> None:
        self.worker = self._started()

    def replace(self) -> None:
        self.stop()
        self.start()
        self.worker.wait_until_ready()


@pytest.fixture
def rolling(tmp_path: Path, lane: str) -> Iterator[Rolling]:
    rolling = Rolling(tmp_path, lane)
    yield rolling
    rolling.worker.kill()


def _losses(
    session: RemoteSession, steps: int, each: Callable[[int], None]
) -> list[float]:
    """The losses of a training, with `each` called before each step."""
    f = RemoteJaxFunction(session, name="damped")
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(4, 3, generator=generator, requires_grad=True)
    x = torch.randn(16, 4, generator=generator)
    y = torch.randn(16, 3, generator=generator)
    adam = torch.optim.Adam([w], lr=0.05)
    losses = []
    for step in range(steps):
        each(step)
        adam.zero_grad()
        loss = ((f(x, w) - y) ** 2).mean()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    return losses


def test_a_training_goes_on_through_rolling_restarts(
    rolling: Rolling, lane: str
) -> None:
    """Signalled between any two calls; the losses are those of an undisturbed training."""
    with connect(rolling.address, lane=lane) as session:
        expected = _losses(session, 60, lambda step: None)
        gc.collect()
        blocks = session.stats()["blocks"]
        replacing: list[threading.Thread] = []

        def disturb(step: int) -> None:
            if step % 20 == 10:
                for thread in replacing:
                    thread.join()
                replacing.append(threading.Thread(target=rolling.replace))
                replacing[-1].start()
            time.sleep(0.01)

        assert _losses(session, 60, disturb) == expected
        for thread in replacing:
            thread.join()
        gc.collect()
        assert session.stats()["blocks"] == blocks


def test_a_backward_meets_the_successor(rolling: Rolling, lane: str) -> None:
    """The residual is gone with its worker, so the successor computes the forward again."""
    with connect(rolling.address, lane=lane) as session:
        f = RemoteJaxFunction(session, name="damped")
        x, w = torch.ones(2, 4), torch.full((4, 3), 0.25, requires_grad=True)
        f(x, w).sum().backward()
        expected, w.grad = w.grad, None
        y = f(x, w).sum()
        rolling.replace()
        y.backward()
        torch.testing.assert_close(w.grad, expected, rtol=0, atol=0)


def test_a_call_under_way_ends_on_the_draining_worker(
    rolling: Rolling, lane: str
) -> None:
    """While the next call of the same session waits for the successor."""
    with connect(rolling.address, lane=lane) as session:
        slow = RemoteJaxFunction(session, name="slow")
        x = torch.ones(3)
        assert slow(x).tolist() == [2, 2, 2]
        under_way = slow.submit(x)
        time.sleep(0.1)
        replacing = threading.Thread(target=rolling.replace)
        replacing.start()
        time.sleep(0.1)  # the signal
        assert slow(2 * x).tolist() == [4, 4, 4]
        assert under_way.result().tolist() == [2, 2, 2]
        replacing.join()


def test_a_worker_that_does_not_come_back_is_an_error(
    rolling: Rolling, lane: str, caplog: pytest.LogCaptureFixture
) -> None:
    """After `retry_s`, or the call's own limit if that is shorter; the log says what is waited for.

    `retries`, since gRPC may take a call before it notices that its connection has ended.
    """
    with connect(rolling.address, lane=lane, retry_s=3, retries=1) as session:
        f = RemoteJaxFunction(session, name="slow")
        f(torch.ones(3))
        rolling.stop(signal.SIGKILL)
        with pytest.raises(WorkerUnavailable):
            f(torch.ones(3))
    assert "waiting up to 3 s" in caplog.text
    rolling.start()


def test_the_limit_of_a_call_ends_its_wait(rolling: Rolling, lane: str) -> None:
    with connect(rolling.address, lane=lane) as session:
        arguments = torch.ones(1, 4), torch.ones(4, 3)
        RemoteJaxFunction(session, name="damped")(*arguments)
        f = RemoteJaxFunction(session, name="damped", timeout_s=0.3)
        rolling.stop(signal.SIGKILL)
        begun = time.monotonic()
        with pytest.raises(WorkerUnavailable):
            f(*arguments)
        assert time.monotonic() - begun < 20  # far below the default of 30
    rolling.start()


def test_a_call_whose_worker_died_is_repeated_as_often_as_allowed(
    rolling: Rolling, lane: str, tmp_path: Path
) -> None:
    """By default it is not, since it may have run."""
    expected = [3.0, 3.0]
    for retries in (0, 1):
        (tmp_path / "mark").touch()
        with connect(rolling.address, lane=lane, retries=retries) as session:
            f = RemoteJaxFunction(session, name="mortal")
            assert f(torch.ones(2)).tolist() == expected
            (tmp_path / "mark").unlink()
            successor = threading.Thread(
                target=lambda: (rolling.worker.wait(), rolling.start())
            )
            successor.start()
            rolling._address = rolling.address
            if retries:
                assert f(torch.ones(2)).tolist() == expected
            else:
                with pytest.raises(WorkerDied):
                    f(torch.ones(2))
            successor.join()
            rolling.worker.wait_until_ready()


def test_connect_waits_for_a_worker_that_starts(rolling: Rolling, lane: str) -> None:
    rolling.stop()
    with pytest.raises(WorkerUnavailable):
        connect(rolling._address, lane=lane)
    rolling.start()
    with connect(rolling._address, lane=lane, wait_s=60) as session:
        f = RemoteJaxFunction(session, name="slow")
        assert f(torch.ones(1)).tolist() == [2]


@pytest.mark.parametrize("wanted", ["the default", "this lane"])
def test_a_worker_that_ends_while_a_lane_attaches_is_no_other_fault(
    rolling: Rolling, lane: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No call has run: the client waits for the successor and takes the same lane, without
    `retries`."""
    kind: Any = link.LocalLane if lane == "local" else link.GrpcLane
    attach, count = kind.__init__, 0

    def ended_before(*args: Any) -> None:
        nonlocal count
        count += 1
        if count == 1:
            rolling.stop(signal.SIGKILL)
            rolling.start()
        attach(*args)

    monkeypatch.setattr(kind, "__init__", ended_before)
    only = lane if wanted == "this lane" or lane == "grpc" else None
    with connect(rolling.address, lane=only, wait_s=60) as session:
        assert session.lane == lane
        assert session.stats()["fallbacks"] == 0
        assert RemoteJaxFunction(session, name="slow")(torch.ones(1)).tolist() == [2]


def test_a_connection_without_an_answer_is_made_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where a connection is never answered there is no worker, and `wait_s` and `retry_s` apply.

    A restarted container may have another IP address: a connection to the old one timed out, and
    the call failed with CallTimeout.
    """
    monkeypatch.setattr(link, "_CONNECT_S", 0.3)
    # gRPC keeps the descriptors of a connection so long after its channel was closed: 20 s else.
    soon = ("grpc.min_reconnect_backoff_ms", 500)
    monkeypatch.setattr(link, "_CHANNEL_OPTIONS", (*link._CHANNEL_OPTIONS, soon))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        silent.setblocking(False)
        for wait_s in (0.0, 5.0):
            attempts = 0
            with pytest.raises(WorkerUnavailable, match="answered a connection"):
                connect(address, wait_s=wait_s)
            with contextlib.suppress(BlockingIOError):
                while True:
                    silent.accept()[0].close()
                    attempts += 1
        assert attempts > 1


def test_another_revision_warns_once_or_is_an_error(
    rolling: Rolling, lane: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Also for a gradient, whose forward pass ran on the former revision."""
    rolling.flags = ["--revision=one"]
    rolling.replace()
    strict = connect(rolling.address, lane=lane, require_revision=True)
    with strict, connect(rolling.address, lane=lane) as session:
        assert session.revision == "one"
        functions = [RemoteJaxFunction(s, name="slow") for s in (session, strict)]
        x = torch.ones(2)
        for f in functions:
            f(x)
        rolling.flags = ["--revision=two"]
        rolling.replace()
        with caplog.at_level(logging.WARNING, "bridge_client"):
            for _ in range(3):
                assert functions[0](x).tolist() == [2, 2]
        assert caplog.text.count("'two'") == 1
        for _ in range(2):
            with pytest.raises(ModelChanged, match="'one', and are now of 'two'"):
                functions[1](x)


def test_how_a_spawned_worker_died_is_told(tmp_path: Path) -> None:
    """And `stats` counts its restarts."""
    (tmp_path / "restarted_models.py").write_text(_MODEL)
    session = spawn(
        jax_model={
            "deadly": "restarted_models:deadly",
            "slow": "restarted_models:slow",
        },
        python=python_of(".venv-jax"),
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
    )
    with session:
        deadly = RemoteJaxFunction(session, name="deadly")
        with pytest.raises(WorkerDied, match="killed by SIGKILL, perhaps for lack of"):
            deadly(torch.ones(2))
        assert session.stats()["restarts"] == 0
        slow = RemoteJaxFunction(session, name="slow")
        assert slow(torch.ones(2)).tolist() == [2, 2]
        assert session.stats()["restarts"] == 1


def test_a_spawned_worker_that_drains_is_started_anew(tmp_path: Path) -> None:
    """The call waits for the old one's end, whoever has asked for it."""
    (tmp_path / "restarted_models.py").write_text(_MODEL)
    session = spawn(
        jax_model="restarted_models:slow",
        python=python_of(".venv-jax"),
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
    )
    with session:
        f = RemoteJaxFunction(session)
        pid = session._host._process.pid
        for _ in range(2):
            under_way = f.submit(torch.ones(2))
            time.sleep(0.1)
            os.kill(session._host._process.pid, signal.SIGTERM)
            assert f(torch.ones(2)).tolist() == [2, 2]
            assert under_way.result().tolist() == [2, 2]
        assert session._host._process.pid != pid


def test_a_worker_that_cannot_start_again_says_how_it_ended(tmp_path: Path) -> None:
    module = tmp_path / "broken_later.py"
    module.write_text(_MODEL)
    session = spawn(
        jax_model="broken_later:slow",
        python=python_of(".venv-jax"),
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
    )
    with session:
        f = RemoteJaxFunction(session)
        f(torch.ones(2))
        module.write_text("raise ValueError('a new fault')")
        os.kill(session._host._process.pid, signal.SIGKILL)
        assert eventually(lambda: session._host._process.poll() is not None)
        with pytest.raises(
            WorkerCrashed, match=r"(?s)exited with status 2.*a new fault"
        ):
            f(torch.ones(2))


@pytest.mark.parametrize(
    "options",
    [
        {"retries": -1},
        {"retries": 1.5},
        {"retries": True},
        {"retry_s": -1},
        {"retry_s": float("nan")},
        {"wait_s": float("inf")},
        {"wait_s": "3"},
    ],
    ids=str,
)
def test_numbers_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(CallerError, match=next(iter(options))):
        connect("unix:/nowhere", **options)


def test_calls_of_many_threads_end_on_the_draining_worker(
    rolling: Rolling, lane: str
) -> None:
    """Those that are refused meanwhile do not cut off those that are under way."""
    with connect(rolling.address, lane=lane) as session:
        slow = RemoteJaxFunction(session, name="slow")
        slow(torch.ones(3))
        calls = [slow.submit(torch.full((3,), float(i))) for i in range(3)]
        time.sleep(0.1)
        replacing = threading.Thread(target=rolling.replace)
        replacing.start()
        time.sleep(0.1)
        calls += [slow.submit(torch.full((3,), float(i))) for i in range(3, 12)]
        for i, call in enumerate(calls):
            assert call.result().tolist() == [2.0 * i] * 3
        replacing.join()
