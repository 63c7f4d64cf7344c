"""Turns on the GPU: what a lane's run waits for there, and what its client may wait for afterwards.

No framework.
"""

import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

from bridge_wire.errors import CudaError
from bridge_wire.memory.cuda import Device, driver
from bridge_wire.memory.cuda_words import FIRST, PROBE_S, Words

_log = logging.getLogger(__name__)

# Past either, a lane waits for the GPU rather than hold more of what it has still to copy.
_MOST_HELD = 64
_MOST_HELD_BYTES = 256 << 20
_POLL_S = 0.002


class Turn:
    """How one lane's runs and its client's own work take turns on a GPU. By itself, each side waits
    on the host.

    A run begins when the client's work is done, which it is already when the client asks; and it
    has been done itself when the client hears of it.
    """

    def __init__(self, device: Device, stream: int | None) -> None:
        """Begin to take turns.

        `stream` is the one that the models of this thread run on; None gives the lane a stream of
        its own, to which the outputs are brought.
        """
        self.device = device
        self._held: list[tuple[Any, ...]] = []
        self._held_bytes = 0
        self._owns_stream = stream is None
        self.stream = device.new_stream() if stream is None else stream

    def wait(self, stream: int | None) -> None:
        """Let a stream wait until the inputs are there; without a stream, wait here."""

    def copy(self, target: int, source: int, nbytes: int, *owners: object) -> None:
        """Copy an output, once what is on this lane's stream is done.

        The owners are held until it has been copied.
        """
        self.device.copy(target, source, nbytes, self.stream)
        self._held.append(owners)
        self._held_bytes += nbytes

    def begin(self, number: int = 0) -> None:
        """Begin the run of this number: no output is written before the client's work is done. Let
        go of what has been copied by now.
        """
        if self._held:  # before the stream waits for the client
            if len(self._held) > _MOST_HELD or self._held_bytes > _MOST_HELD_BYTES:
                self.finish()
            elif self._has_passed():
                self._let_go()
        self._expect(number)
        self.wait(self.stream)

    def end(self) -> None:
        """End a run: from now on the client may wait for its outputs."""
        self.finish()

    def finish(self) -> None:
        """Wait until all that this lane has put on the GPU is done."""
        self.device.synchronize(self.stream)
        self._let_go()

    def is_stuck(self, patience_s: float) -> bool:
        """Whether this lane's work waits for good for a client that has ended the lane: if it
        has for that long."""
        return False

    def close(self) -> None:
        """Finish, and let go of everything.

        Where the GPU has failed, there is nothing left to wait for.
        """
        with contextlib.suppress(CudaError):
            self.finish()
        self._let_go()
        with contextlib.suppress(CudaError):
            self._release()
        if self._owns_stream:
            with contextlib.suppress(CudaError):
                self.device.destroy_stream(self.stream)

    def _expect(self, number: int) -> None:
        """Note the number of the run that begins."""

    def _has_passed(self) -> bool:
        """Whether the last run is known to be done on the GPU."""
        return False

    def _release(self) -> None:
        """Let go of what the two sides wait for."""

    def _let_go(self) -> None:
        self._held.clear()
        self._held_bytes = 0


class TurnByWords(Turn):
    """Turns in order by two counters in a slab: neither host waits."""

    def __init__(
        self,
        device: Device,
        pointer: int,
        stream: int | None,
        is_connected: Callable[[], bool] = lambda: True,
    ) -> None:
        """Begin to take turns by the words at a pointer; `is_connected` says whether the client may
        still write there.

        Raises:
          CudaError: this process does not see what the client writes there.
        """
        if not device.has_words:
            raise CudaError("this driver has streams neither write nor wait for words of 64 bits")
        self._words = words = Words(device, pointer, device.new_urgent_stream(), is_clients=False)
        self._number = FIRST
        self._is_connected = is_connected
        try:
            if not words.pass_within(FIRST, PROBE_S):
                raise CudaError("a stream here does not see the word that the client has written")
            words.write(FIRST, words.stream)
            super().__init__(device, stream)
            self._done = device.new_event()
        except BaseException:
            with contextlib.suppress(
                CudaError
            ):  # end the wait, on a stream that does not wait itself
                Words(device, pointer, device.new_urgent_stream(), is_clients=False).release(FIRST)
            words.close()
            raise

    def wait(self, stream: int | None) -> None:
        if stream is not None:
            self._words.wait(self._number, stream)
        else:
            self._wait_here(None)

    def end(self) -> None:
        self._words.write(self._number, self.stream)
        self.device.record(self._done, self.stream)  # to ask for it costs less than to read a word

    def is_stuck(self, patience_s: float) -> bool:
        """No: what is missing of a client that is gone is written here, in its place.

        Nobody will see the outputs.
        """
        with contextlib.suppress(CudaError):
            self._wait_here(patience_s)
        return False

    def _wait_here(self, patience_s: float | None) -> None:
        deadline = None if patience_s is None else time.monotonic() + patience_s
        while not self._words.comes_within(self._number, _POLL_S):
            if not self._is_connected() or (deadline is not None and time.monotonic() > deadline):
                _log.info(
                    "a client has ended before its GPU came to a call; the call reads what is there"
                )
                self._words.release(self._number)

    def _expect(self, number: int) -> None:
        self._number = number

    def _has_passed(self) -> bool:
        return driver().has_passed(self._done)

    def _release(self) -> None:
        self._words.close()
        self.device.destroy_event(self._done)


class TurnByEvents(Turn):
    """Turns in order by one event of each side, which it records behind its work: neither host
    waits.

    CUDA has nobody record the event of a process that was killed before its GPU came to it. What
    waits for that, and all that comes behind it on the stream, waits forever.
    """

    def __init__(
        self, device: Device, ready: int, stream: int | None, *, is_shared: bool = True
    ) -> None:
        """Begin to take turns; `ready` is the client's event, which is this object's from now on,
        `done` this side's, which another process can open if it is shared.
        """
        super().__init__(device, stream)
        self._ready: int | None = ready
        self.done = device.new_event(is_shared=is_shared)
        # Stands for the wait for the client's event, which its owner may destroy.
        self._begun = device.new_event() if is_shared else None

    def wait(self, stream: int | None) -> None:
        if self._ready is not None:
            self.device.wait(self._ready, stream)

    def begin(self, number: int = 0) -> None:
        super().begin(number)
        if self._begun is not None:
            self.device.record(self._begun, self.stream)

    def end(self) -> None:
        self.device.record(self.done, self.stream)

    def is_stuck(self, patience_s: float) -> bool:
        deadline = time.monotonic() + patience_s
        while self._begun is not None and driver().is_pending(self._begun):
            if time.monotonic() > deadline:
                return True
            time.sleep(_POLL_S)
        return False

    def _has_passed(self) -> bool:
        return driver().has_passed(self.done)

    def _release(self) -> None:
        ready, self._ready = self._ready, None
        for event in (ready, self.done, self._begun):
            if event is not None:
                with contextlib.suppress(CudaError):
                    self.device.destroy_event(event)


def turn_with(
    device: Device,
    event: bytes,
    words: int | None,
    stream: int | None,
    is_connected: Callable[[], bool],
) -> Turn:
    """Begin to take turns with a client that offers the handle of an event, or words at a pointer:
    in that way, or without either if it does not work here.
    """
    try:
        if words is not None:
            return TurnByWords(device, words, stream, is_connected)
        if event:
            return TurnByEvents(device, device.open_event(event), stream)
    except CudaError as error:
        _log.warning("a client's %s cannot be used: %s", "event" if event else "words", error)
    return Turn(device, stream)
