"""Fixtures for every test on a GPU: there is one, and no thread is left behind."""

import gc
import signal
import threading
from collections.abc import Iterator

import pytest

from bridge_wire.memory.cuda import gpus
from tests.conftest import eventually, held
from tests.gpu.on_gpu.machine import REHEARSED

WAIT_S = 300 if REHEARSED else 45


def limit_s(item: pytest.Item) -> int:
    """Return how long a test may take: WAIT_S, or the `limit_s` of its mark."""
    mark = item.get_closest_marker("gpu")
    return max(WAIT_S, mark.kwargs.get("limit_s", 0) if mark else 0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A test that waits for a GPU cannot be interrupted, and may wait for a dead process forever:
    SIGALRM ends the run then, and prints the stacks of all threads
    (`tests.conftest.pytest_configure`).
    """
    if item.config.getoption("gpu"):
        signal.alarm(limit_s(item))
    result = yield
    signal.alarm(0)
    return result


@pytest.fixture(autouse=True, scope="session")
def gpu() -> None:
    """The GPU that --gpu declares is there."""
    if not REHEARSED and not gpus():
        pytest.exit("--gpu was given, but there is no GPU here", returncode=1)


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """After each test there are no more threads than before. Descriptors are CUDA's own affair, and
    children the workers'.
    """
    before = held()["threads"]
    yield
    gc.collect()
    assert eventually(lambda: held()["threads"] <= before), threading.enumerate()
