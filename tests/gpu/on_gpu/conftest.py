"""What holds for every test on a GPU: there is one, and no thread is left behind."""

import gc
import threading
from collections.abc import Iterator

import pytest

from bridge_wire.cuda import gpus
from tests.conftest import eventually, held
from tests.gpu.on_gpu.machine import REHEARSED


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
