"""Copies of memory to memory, by one thread or several."""

import ctypes
import gc
import threading
import weakref
from typing import Any

import numpy as np
import pytest

from bridge_wire.memory import copying
from bridge_wire.memory.copying import copy

MIB = 1 << 20


@pytest.mark.parametrize("nbytes", [0, 1, 4 * MIB - 1, 4 * MIB, 9 * MIB + 7])
@pytest.mark.parametrize("cores", [1, 2, 3, 64])
def test_every_byte_is_copied(
    nbytes: int, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target has the source's bytes, and no byte beyond is touched, however many threads
    share the work."""
    monkeypatch.setattr(copying, "usable_cores", lambda: cores)
    source = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)
    target = np.zeros(nbytes + 1, np.uint8)
    copy(target.ctypes.data, source.ctypes.data, nbytes)
    assert np.array_equal(target[:-1], source) and target[-1] == 0


def test_an_interrupted_copy_keeps_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends the copy in the caller, and the memory is kept until the other threads have
    let go of it."""
    interrupted, caller, memmove = (
        threading.Event(),
        threading.current_thread(),
        ctypes.memmove,
    )

    def held(*args: Any) -> None:
        if threading.current_thread() is caller:
            raise KeyboardInterrupt
        assert interrupted.wait(30)
        memmove(*args)

    monkeypatch.setattr(copying, "usable_cores", lambda: 2)
    monkeypatch.setattr(copying.ctypes, "memmove", held)
    source, target = np.ones(8 * MIB, np.uint8), np.zeros(8 * MIB, np.uint8)
    done = threading.Event()
    weakref.finalize(source, done.set)
    with pytest.raises(KeyboardInterrupt):
        copy(target.ctypes.data, source.ctypes.data, source.nbytes, source, target)
    del source
    gc.collect()
    assert not done.is_set()
    interrupted.set()
    assert done.wait(30)
    assert target[-1] == 1
