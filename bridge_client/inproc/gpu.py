"""GPU memory of in-process sessions, and stream-ordered turns of caller and models.

Imports no framework.
"""

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from bridge_server.turns import TurnByEvents
from bridge_wire.memory.cuda import Device
from bridge_wire.memory.cuda_memory import (
    ALIGNMENT,
    FIRST_ADDRESS,
    GpuPool,
    end_what_is_left,
    leave,
)


class ProcessGpuMemory(GpuPool):
    """Passes aligned GPU memory in place; slabs hold copies of other memory.

    The address of memory outside blocks is its pointer plus FIRST_ADDRESS, above all host
    addresses.
    """

    def address_of(self, pointer: int, nbytes: int) -> int | None:
        return None if pointer % ALIGNMENT else FIRST_ADDRESS + pointer


class NearTurn(TurnByEvents):
    """A turn of models in the client's process. Orders both sides' streams at once, since both
    streams are known."""

    def __init__(self, device: Device, stream: int | None) -> None:
        """Create a turn; `stream` is the stream of this thread's models, as for any turn."""
        super().__init__(device, device.new_event(), stream, is_shared=False)

    def follow(self, stream: int) -> None:
        """Make the next run wait for the present work of the caller's stream."""
        assert self._ready is not None, "only close destroys the event"
        self.device.record(self._ready, stream)

    def precede(self, stream: int) -> None:
        """Make later work on the caller's stream wait for the last run."""
        self.device.wait(self.done, stream)


class Turns:
    """Pool of one session's turns, by the models' stream. Grows with the number of concurrent
    calls."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._idle: defaultdict[int | None, list[NearTurn]] = defaultdict(list)
        weakref.finalize(self, _leave_all, self._idle).atexit = False

    @contextlib.contextmanager
    def taken(self, models_stream: int | None, stream: int) -> Iterator[NearTurn]:
        """Take a turn: the context's work runs after the present work of the caller's stream, and
        before its later work."""
        idle = self._idle[models_stream]
        try:
            turn = idle.pop()
        except IndexError:
            turn = NearTurn(self._device, models_stream)
        try:
            turn.follow(stream)
            turn.begin()
            yield turn
            turn.end()
            turn.precede(stream)
        except BaseException:
            turn.finish()  # after the error, the caller reuses its memory
            raise
        finally:
            idle.append(turn)

    def close(self) -> None:
        """Wait for pending work, and release streams and events."""
        _leave_all(self._idle)
        end_what_is_left()


def _leave_all(turns: Mapping[Any, list[NearTurn]]) -> None:
    for idle in turns.values():
        while idle:
            leave(NearTurn.close, idle.pop())
