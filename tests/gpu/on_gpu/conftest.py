"""What holds for every test on a GPU: there is one, and no thread is left behind."""

import gc
import signal
import threading
from collections.abc import Iterator

import pytest

from bridge_wire.cuda import gpus
from tests.conftest import eventually, held
from tests.gpu.on_gpu.machine import REHEARSED


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Nobody interrupts what waits for a GPU, and it may wait for another process for good: that ends the run, some
    time after pytest has told where it is."""
    if item.config.getoption("gpu"):
        signal.alarm(2 * int(float(item.config.getini("faulthandler_timeout"))))
    result = yield
    signal.alarm(0)
    return result


@pytest.fixture(autouse=True, scope="session")
def gpu() -> None:
    """What is declared by --gpu is there."""
    if not REHEARSED and not gpus():
        pytest.exit("--gpu was given, but there is no GPU here", returncode=1)


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """After each test there are no more threads than before. Descriptors are CUDA's own affair, and children the
    workers'."""
    before = held()["threads"]
    yield
    gc.collect()
    assert eventually(lambda: held()["threads"] <= before), threading.enumerate()
