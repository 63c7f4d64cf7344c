"""CUDA experiments with two processes that share memory, words and events, for `gpu_probe`.

`python -m bench.gpu_pairs ROLE` is the other process, which answers each line with a line. Both
processes use one GPU and copy within the GPU only, since a copy from host memory may block until
the stream's earlier work is done.
"""

import contextlib
import ctypes
import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from bench import ROOT
from bridge_wire.errors import CudaError
from bridge_wire.memory.cuda import Device, device_of, driver, gpus
from bridge_wire.memory.cuda_memory import copied_to_host, copy_to_device
from bridge_wire.memory.cuda_words import FIRST, Words

_UNIT = 2 << 20
_REST_S = 3.0 if os.environ.get("BRIDGE_TESTS_REHEARSE") else 15.0
_RELEASE_S = 5.0
_CYCLES_PER_S = 1.9e9  # an H200's clock
_MANY = 40  # number of streams, more than the GPU's hardware queues


def device() -> Device:
    """Return the first GPU."""
    return device_of(gpus()[0].uuid)


def delay(stream: int, seconds: float) -> None:
    """Block a stream for some time without GPU work: libc's usleep as a host function."""
    usleep = ctypes.cast(ctypes.CDLL(None).usleep, ctypes.c_void_p)
    microseconds = ctypes.c_void_p(int(seconds * 1e6))
    status = driver()._library.cuLaunchHostFunc(
        ctypes.c_void_p(stream), usleep, microseconds
    )
    if status:
        raise CudaError(f"cuLaunchHostFunc: {status}")


@functools.cache
def holding(value: int) -> int:
    """Return GPU memory that holds a number."""
    pointer = device().allocate(_UNIT)
    copy_to_device(device(), pointer, value.to_bytes(8, "little"))
    return pointer


def number_at(pointer: int) -> int:
    """Return the current number at a GPU pointer."""
    return int.from_bytes(copied_to_host(device(), pointer, 8), "little")


def comes_to_rest(stream: int, within_s: float = _REST_S) -> bool:
    """Whether all work on a stream finishes within some time."""
    deadline = time.monotonic() + within_s
    while device().is_busy(stream) and time.monotonic() < deadline:
        time.sleep(0.005)
    return not device().is_busy(stream)


class Other:
    """The other process in a role, until its kill."""

    def __init__(self, role: Callable[..., None], *arguments: object) -> None:
        command = [
            sys.executable,
            "-m",
            "bench.gpu_pairs",
            role.__name__,
            *map(str, arguments),
        ]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "Other":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def ask(self, *words: object) -> str:
        """Send a line and return the answer."""
        print(*words, file=self._process.stdin, flush=True)
        return self.said()

    def said(self) -> str:
        """Return the next line of the process's output."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the other process ended with {self._process.wait()}")
        return line.strip()

    def kill(self) -> None:
        """Kill the process, as by `kill -9`."""
        self._process.kill()
        self._process.communicate()


def _say(*words: object) -> None:
    print(*words, flush=True)


def _heard() -> list[str]:
    line = sys.stdin.readline()
    if not line:
        os._exit(0)
    return line.split()


# Repeated record of an event ----------------------------------------------------------------------


def rerecorded() -> str:
    """Whether a record on another stream changes a pending wait in another process.

    The record could end or delay the wait.
    """
    return "; ".join(
        f"{name}: {_with_later_record(later_s)}"
        for name, later_s in (
            ("a later record on an idle stream", 0.0),
            ("on a delayed stream", 3.0),
        )
    )


def _with_later_record(later_s: float) -> str:
    memory, event = device().allocate(_UNIT), device().new_event(is_shared=True)
    one, two = device().new_stream(), device().new_stream()
    device().copy(memory, holding(0), 8, one)
    device().record(event, one)  # every lane has recorded its event before
    device().synchronize(one)
    holding(1)
    with Other(waiting) as other:
        other.ask(
            device().handle_of(memory).hex(), device().event_handle_of(event).hex()
        )
        delay(one, 0.6)
        device().copy(memory, holding(1), 8, one)
        device().record(event, one)
        other.ask("wait")  # on return, the wait is on the other process's stream
        if later_s:
            delay(two, later_s)
        device().record(event, two)
        value, seconds = other.ask("done?").split()
        device().synchronize(two)
    found = f"read {value} after {float(seconds):.2f} s, due at 0.6"
    if value != "1":
        return f"RELEASED TOO SOON, {found}"
    return f"DELAYED, {found}" if float(seconds) > 2.0 else f"no effect, {found}"


def waiting() -> None:
    """Role: wait for an event, then copy."""
    memory, event = _heard()
    pointer, opened = (
        device().open(bytes.fromhex(memory), _UNIT),
        device().open_event(bytes.fromhex(event)),
    )
    stream, target = device().new_stream(), device().allocate(_UNIT)
    _say("ready")
    _heard()
    begun = time.monotonic()
    device().wait(opened, stream)
    device().copy(target, pointer, 8, stream)
    _say("waits")
    _heard()
    device().synchronize(stream)
    seconds = time.monotonic() - begun
    _say(number_at(target), seconds)
    _heard()


# Opening and closing while a kernel runs ----------------------------------------------------------


def _is_busy(other: Other) -> bool:
    return other.ask("busy?") == "True"


def opening() -> str:
    """Return the time of each CUDA call while a kernel of two seconds runs.

    The kernel runs first in the other process, then in this one.
    """
    found = []
    for where in ("there", "here"):
        with Other(spinning) as other:
            memory, event = map(bytes.fromhex, other.said().split())
            if where == "there":
                other.ask("spin")
                is_busy: Callable[[], bool] = functools.partial(_is_busy, other)
            else:
                is_busy = _spin(2.0)
            found.append(
                f"kernel {where}: " + ", ".join(_timed(_calls(memory, event), is_busy))
            )
    return "; ".join(found)


def _calls(memory: bytes, event: bytes) -> Mapping[str, Callable[[], object]]:
    made: dict[str, int] = {}
    return {
        "event made": lambda: device().new_event(is_shared=True),
        "event opened": lambda: made.update(event=device().open_event(event)),
        "memory opened": lambda: made.update(memory=device().open(memory, _UNIT)),
        "event destroyed": lambda: device().destroy_event(made["event"]),
        "memory closed": lambda: device().close(made["memory"]),
        "memory made": lambda: made.update(own=device().allocate(_UNIT)),
        "memory freed": lambda: device().free(made["own"]),
    }


def _timed(
    calls: Mapping[str, Callable[[], object]], is_busy: Callable[[], bool]
) -> list[str]:
    took = []
    for name, call in calls.items():
        begun = time.monotonic()
        try:
            call()
        except (CudaError, KeyError) as error:
            took.append(f"{name}: {error}")
            continue
        ms = (time.monotonic() - begun) * 1e3
        took.append(f"{name} {ms:.1f} ms" + ("" if is_busy() else " (kernel over)"))
    return took


def _spin(seconds: float) -> Callable[[], bool]:
    """Keep the GPU busy with one kernel, from torch if torch has CUDA.

    Return a function that reports whether the kernel still runs.
    """
    import torch

    if torch.cuda.is_available():
        torch.ones(1, device="cuda")
        torch.cuda._sleep(int(seconds * _CYCLES_PER_S))
        return lambda: not torch.cuda.current_stream().query()
    stream = device().new_stream()
    delay(stream, seconds)
    return lambda: device().is_busy(stream)


def spinning() -> None:
    """Role: export memory and an event, then run a kernel."""
    memory, event, stream = (
        device().allocate(_UNIT),
        device().new_event(is_shared=True),
        device().new_stream(),
    )
    device().record(event, stream)
    _say(device().handle_of(memory).hex(), device().event_handle_of(event).hex())
    _heard()
    is_busy = _spin(2.0)
    _say("spins")
    while True:
        _heard()
        _say(is_busy())


# Events after their owner destroys them or exits --------------------------------------------------


def destroyed() -> str:
    """Return the behavior of an opened, passed event after its owner has destroyed it or died."""
    found = []
    for how in ("destroyed", "killed"):
        with Other(destroying) as other:
            event, stream = (
                device().open_event(bytes.fromhex(other.said())),
                device().new_stream(),
            )
            if how == "killed":
                other.kill()
            else:
                other.ask("destroy")
            said = [f"query {driver()._library.cuEventQuery(ctypes.c_void_p(event))}"]
            said.append(_outcome("wait", device().wait, event, stream))
            said.append(_outcome("synchronize", device().synchronize, stream))
            said.append(_outcome("destroy", device().destroy_event, event))
            found.append(f"{how}: {', '.join(said)}")
    return "; ".join(found)


def _outcome(name: str, action: Callable[..., None], *arguments: int) -> str:
    try:
        action(*arguments)
    except CudaError as error:
        return f"{name}: {error}"
    return f"{name} ok"


def destroying() -> None:
    """Role: export a passed event, and destroy the event on request."""
    event, stream = device().new_event(is_shared=True), device().new_stream()
    device().record(event, stream)
    device().synchronize(stream)
    _say(device().event_handle_of(event).hex())
    _heard()
    device().destroy_event(event)
    _say("destroyed")
    _heard()


def dead_events() -> str:
    """Return the outcome for a stream whose event's process is killed or destroys the event."""
    return "; ".join(f"{how}: {_waiting_for(how)}" for how in ("killed", "destroyed"))


def _waiting_for(how: str) -> str:
    stream, other_stream = device().new_stream(), device().new_stream()
    with Other(recording) as other:
        event = device().open_event(bytes.fromhex(other.said()))
        other.ask("record")
        device().wait(event, stream)
        if not device().is_busy(stream):
            return "inconclusive: the event had passed too soon"
        if how == "killed":
            other.kill()
        else:
            other.ask("destroy")
        if comes_to_rest(stream):
            return "the stream continues"
        device().record(event, other_stream)
        helps = "continues" if comes_to_rest(stream) else "hangs"
    return f"the stream hangs; after this process records the event, the stream {helps}"


def recording() -> None:
    """Role: record an event after a delay of a second, and destroy the event on request."""
    stream, event = device().new_stream(), device().new_event(is_shared=True)
    _say(device().event_handle_of(event).hex())
    _heard()
    delay(stream, 1.0)
    device().record(event, stream)
    _say("recorded")
    _heard()
    device().destroy_event(event)
    _say("destroyed")
    _heard()


# Words --------------------------------------------------------------------------------------------


def words() -> str:
    """Whether streams of two processes wait for words in shared memory, in order with data.

    Also whether the survivor of a kill can release its own streams, many at a time.
    """
    if not device().has_words:
        return "no: CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS is 0"
    waiting_streams = [device().new_stream() for _ in range(_MANY)]
    with Other(writing) as other:
        memory = device().open(bytes.fromhex(other.said()), _UNIT)
        side = Words(device(), memory, device().new_urgent_stream(), is_clients=False)
        begun = time.monotonic()
        for stream in waiting_streams:
            side.wait(FIRST, stream)
        other.ask("write")
        crosses = all(comes_to_rest(stream, _RELEASE_S) for stream in waiting_streams)
        seconds, seen = time.monotonic() - begun, number_at(memory + 4096)
        for stream in waiting_streams:
            side.wait(FIRST + 1, stream)
        time.sleep(0.1)
        is_held = device().is_busy(waiting_streams[0])
        other.kill()
    time.sleep(0.5)
    is_still_held = device().is_busy(waiting_streams[0])
    side.release(FIRST + 1)
    is_released = all(comes_to_rest(stream, _RELEASE_S) for stream in waiting_streams)
    is_well = crosses and seen == 7 and is_held and is_still_held and is_released
    return (
        f"{'yes' if is_well else 'NO'}: crossed {crosses} after {seconds:.2f} s (0.5 due), data"
        f" behind it {seen} (7 due); {_MANY} streams held {is_held}, after the kill"
        f" {is_still_held}, released by this process {is_released}"
    )


def writing() -> None:
    """Role: write data and then a word, after a delay."""
    memory, stream = device().allocate(_UNIT), device().new_stream()
    side = Words(device(), memory, device().new_urgent_stream(), is_clients=True)
    side.clear()
    copy_to_device(device(), memory + 4096, bytes(8))
    holding(7)
    _say(device().handle_of(memory).hex())
    _heard()
    delay(stream, 0.5)
    device().copy(memory + 4096, holding(7), 8, stream)
    side.write(FIRST, stream)
    _say("on its way")
    _heard()


# Memory -------------------------------------------------------------------------------------------


def keeping(nbytes: str) -> None:
    """Role: keep memory until the kill."""
    _say(device().handle_of(device().allocate(int(nbytes))).hex())
    _heard()


_ROLES: Mapping[str, Callable[..., None]] = {
    role.__name__: role
    for role in (waiting, spinning, destroying, recording, writing, keeping)
}


def main(arguments: list[str]) -> Any:
    """Run a role."""
    with contextlib.suppress(KeyboardInterrupt):
        _ROLES[arguments[0]](*arguments[1:])
    os._exit(0)  # CUDA's shutdown may never finish with hanging streams


if __name__ == "__main__":
    main(sys.argv[1:])
