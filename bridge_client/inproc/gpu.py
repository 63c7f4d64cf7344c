"""An in-process session on a GPU: its memory, and the turns that the caller's stream and the
models' take there.

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
    """Any aligned memory of the GPU is passed as it lies, and slabs serve what has to be copied.

    So the address of what lies in no block is its pointer, beyond the addresses of the host's
    memory.
    """

    def address_of(self, pointer: int, nbytes: int) -> int | None:
        return None if pointer % ALIGNMENT else FIRST_ADDRESS + pointer


class NearTurn(TurnByEvents):
    """A turn of models in the client's own process: both sides' streams are known, and put in
    order at once."""

    def __init__(self, device: Device, stream: int | None) -> None:
        """Begin to take turns; `stream` is the one that the models of this thread run on, as for
        any turn."""
        super().__init__(device, device.new_event(), stream, is_shared=False)

    def follow(self, stream: int) -> None:
        """Let the next run wait for what is on the caller's stream."""
        assert self._ready is not None, "it is destroyed by close only"
        self.device.record(self._ready, stream)

    def precede(self, stream: int) -> None:
        """Let what comes on the caller's stream wait for the last run."""
        self.device.wait(self.done, stream)


class Turns:
    """The turns of one session: as many as calls were ever under way at once, for each stream
    that models run on."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._idle: defaultdict[int | None, list[NearTurn]] = defaultdict(list)
        weakref.finalize(self, _leave_all, self._idle).atexit = False

    @contextlib.contextmanager
    def taken(self, models_stream: int | None, stream: int) -> Iterator[NearTurn]:
        """Take a turn: what is within comes after what is on the caller's stream, and before
        what comes there next."""
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
            turn.finish()  # on hearing of the error, the caller takes its memory back
            raise
        finally:
            idle.append(turn)

    def close(self) -> None:
        """Wait for what is under way, and let go of the streams and events."""
        _leave_all(self._idle)
        end_what_is_left()


def _leave_all(turns: Mapping[Any, list[NearTurn]]) -> None:
    for idle in turns.values():
        while idle:
            leave(NearTurn.close, idle.pop())
