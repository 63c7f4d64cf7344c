"""The fake CUDA puts work in order as CUDA does, and no better: tests of the bridge would show
nothing otherwise."""

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import eventually
from tests.gpu.faking import environment

_ASYNC = 0x02 | 0x04
_COPY = 4


@pytest.fixture
def stream(fake_cuda: Any) -> Any:
    made = fake_cuda.streamCreateWithFlags(1)
    yield made
    fake_cuda.streamDestroy(made)


def _filled(fake: Any, value: bytes, nbytes: int = 256) -> int:
    pointer = fake.malloc(nbytes)
    ctypes.memmove(pointer, value * nbytes, nbytes)
    return int(pointer)


def _first(pointer: int) -> bytes:
    return ctypes.string_at(pointer, 1)


def _passed(fake: Any, event: int) -> bool:
    return bool(fake.Library().cuEventQuery(ctypes.c_void_p(event)) == 0)


def test_a_copy_happens_when_the_stream_comes_to_it(
    fake_cuda: Any, stream: int
) -> None:
    """memcpyAsync returns before anything is copied."""
    source, target = _filled(fake_cuda, b"a"), _filled(fake_cuda, b"-")
    held = fake_cuda.hold(stream)
    fake_cuda.memcpyAsync(target, source, 256, _COPY, stream)
    ctypes.memmove(source, b"b" * 256, 256)
    assert _first(target) == b"-"
    held.set()
    fake_cuda.streamSynchronize(stream)
    assert _first(target) == b"b"


def test_streams_do_not_wait_for_each_other(fake_cuda: Any, stream: int) -> None:
    """What is on one stream is done while another one stands still, the default stream too."""
    source, target = _filled(fake_cuda, b"a"), _filled(fake_cuda, b"-")
    held = fake_cuda.hold(stream)
    fake_cuda.memcpyAsync(target, source, 256, _COPY, 0)
    fake_cuda.streamSynchronize(1)  # the default stream's other name
    assert _first(target) == b"a"
    held.set()


def test_a_stream_waits_for_the_event_as_it_was_recorded_at_the_time(
    fake_cuda: Any, stream: int
) -> None:
    """Neither an event that was never recorded holds a stream up, nor a record that comes after
    the wait."""
    event, other = (
        fake_cuda.eventCreateWithFlags(_ASYNC),
        fake_cuda.streamCreateWithFlags(1),
    )
    fake_cuda.streamWaitEvent(other, event)
    fake_cuda.eventSynchronize(event)
    assert _passed(fake_cuda, event)
    held = fake_cuda.hold(stream)
    fake_cuda.streamWaitEvent(other, event)
    fake_cuda.eventRecord(event, stream)
    fake_cuda.streamSynchronize(other)
    assert not _passed(fake_cuda, event)
    fake_cuda.streamWaitEvent(other, event)
    source, target = _filled(fake_cuda, b"a"), _filled(fake_cuda, b"-")
    fake_cuda.memcpyAsync(target, source, 256, _COPY, other)
    assert _first(target) == b"-"
    held.set()
    fake_cuda.streamSynchronize(other)
    assert _first(target) == b"a"
    fake_cuda.eventSynchronize(event)
    assert _passed(fake_cuda, event)


def test_a_later_record_on_another_stream_does_not_stand_for_an_earlier_one(
    fake_cuda: Any, stream: int
) -> None:
    """Who waits for a record waits for that one."""
    event = fake_cuda.eventCreateWithFlags(_ASYNC)
    held = fake_cuda.hold(stream)
    fake_cuda.eventRecord(event, stream)
    reader = fake_cuda.streamCreateWithFlags(1)
    reached = threading.Event()
    fake_cuda.streamWaitEvent(reader, event)
    fake_cuda._stream(reader).put(reached.set)
    fake_cuda.eventRecord(event, 0)
    fake_cuda.eventSynchronize(event)
    assert not reached.is_set()
    held.set()
    assert reached.wait(10)


def test_freeing_waits_for_what_is_on_the_way(fake_cuda: Any, stream: int) -> None:
    """As with cudaFree."""
    source, target = _filled(fake_cuda, b"a"), _filled(fake_cuda, b"-")
    fake_cuda.sleep(stream, 0.05)
    fake_cuda.memcpyAsync(target, source, 256, _COPY, stream)
    fake_cuda.free(source)
    assert _first(target) == b"a"


def test_what_is_held_can_be_counted(fake_cuda: Any, stream: int) -> None:
    """Allocations, events and streams, until they are given back."""
    pointer, event = fake_cuda.malloc(1 << 20), fake_cuda.eventCreateWithFlags(_ASYNC)
    assert fake_cuda.held() == {"bytes": 1 << 20, "mem": 1, "event": 1, "stream": 1}
    free, total = fake_cuda.memGetInfo()
    assert total - free == 1 << 20
    fake_cuda.free(pointer)
    fake_cuda.eventDestroy(event)
    assert fake_cuda.held() == {"stream": 1}


_CHILD = """
import ctypes, sys
from cupy.cuda import runtime

memory, event = (bytes.fromhex(line) for line in sys.argv[1:])
pointer, event = runtime.ipcOpenMemHandle(memory), runtime.ipcOpenEventHandle(event)
assert runtime.ipcOpenMemHandle(memory) == pointer  # once more
runtime.ipcCloseMemHandle(pointer)
print("opened", flush=True)
if sys.stdin.readline() == "wait\\n":
    runtime.eventSynchronize(event)
print(ctypes.string_at(pointer, 1), flush=True)
runtime.hold(0)
runtime.eventRecord(event, 0)
print("recorded", flush=True)
sys.stdin.readline()
"""


def test_another_process_sees_the_memory_and_waits_for_the_event(
    fake_cuda: Any, stream: int, tmp_path: Path
) -> None:
    """Both by their handles; a process that dies holds nothing, and never comes to what it has
    recorded."""
    memory, event = _filled(fake_cuda, b"-"), fake_cuda.eventCreateWithFlags(_ASYNC)
    handles = (
        fake_cuda.ipcGetMemHandle(memory).hex(),
        fake_cuda.ipcGetEventHandle(event).hex(),
    )
    with subprocess.Popen(
        [sys.executable, "-c", _CHILD, *handles],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | environment(tmp_path),
    ) as child:
        assert child.stdin and child.stdout
        assert child.stdout.readline() == "opened\n"
        assert fake_cuda.held()["openmem"] == fake_cuda.held()["openevent"] == 1
        source = _filled(fake_cuda, b"a")
        fake_cuda.sleep(stream, 0.3)
        fake_cuda.memcpyAsync(memory, source, 256, _COPY, stream)
        fake_cuda.eventRecord(event, stream)
        print("wait", file=child.stdin, flush=True)
        assert child.stdout.readline() == "b'a'\n"
        assert child.stdout.readline() == "recorded\n"
        child.kill()
    assert not _passed(fake_cuda, event)
    assert eventually(
        lambda: not fake_cuda.held()["openmem"] and not fake_cuda.held()["openevent"]
    )


def test_what_a_dead_process_has_allocated_lives_while_another_has_it_open(
    fake_cuda: Any,
) -> None:
    """As the driver keeps it."""
    program = """
import ctypes, sys
from cupy.cuda import runtime
pointer = runtime.malloc(4096)
ctypes.memmove(pointer, b"x", 1)
print(runtime.ipcGetMemHandle(pointer).hex(), flush=True)
sys.stdin.readline()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout
        opened = fake_cuda.ipcOpenMemHandle(bytes.fromhex(child.stdout.readline()))
        child.kill()
    assert _first(opened) == b"x" and fake_cuda.held()["bytes"] == 4096
    fake_cuda.ipcCloseMemHandle(opened)
    assert fake_cuda.held() == {}


def test_an_unfinished_stream_does_not_keep_a_process_alive(fake_cuda: Any) -> None:
    """The interpreter ends with work on its way."""
    program = "from cupy.cuda import runtime; runtime.hold(0); runtime.eventCreateWithFlags(6)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    assert fake_cuda.held() == {}


def test_a_context_that_broke_stays_broken(
    fake_cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An illegal address, unlike other errors, ends the use of CUDA in a process."""
    monkeypatch.setenv("FAKE_CUDA_FAILS", "getDevice:801,malloc:700")
    for function, status in (
        (fake_cuda.getDevice, 801),
        (fake_cuda.memGetInfo, 0),
        (lambda: fake_cuda.malloc(1), 700),
    ):
        if status:
            with pytest.raises(fake_cuda.CUDARuntimeError) as raised:
                function()
            assert raised.value.status == status
        else:
            function()
    with pytest.raises(fake_cuda.CUDARuntimeError, match="IllegalAddress"):
        fake_cuda.memGetInfo()
