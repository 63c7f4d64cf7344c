"""Turns on the GPU: stream-ordered handover between a lane's runs and its client's own work.

Imports no framework.
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

# Past either limit a lane waits for the GPU before it holds more outputs for pending copies.
_MOST_HELD = 64
_MOST_HELD_BYTES = 256 << 20
_POLL_S = 0.002


class Turn:
    """The handover between one lane's runs and its client's work; here both sides wait on the CPU.

    The client finishes its GPU work before it sends a run. The worker finishes the run before it
    replies.
    """

    def __init__(self, device: Device, stream: int | None) -> None:
        """Begin to take turns.

        `stream` is the CUDA stream of this thread's models; with None the lane copies the outputs
        on its own stream.
        """
        self.device = device
        self._held: list[tuple[Any, ...]] = []
        self._held_bytes = 0
        self._owns_stream = stream is None
        self.stream = device.new_stream() if stream is None else stream

    def wait(self, stream: int | None) -> None:
        """Let a stream wait for the inputs; without a stream, block."""

    def copy(self, target: int, source: int, nbytes: int, *owners: object) -> None:
        """Copy an output in the order of this lane's stream.

        The owners are held until the copy is done.
        """
        self.device.copy(target, source, nbytes, self.stream)
        self._held.append(owners)
        self._held_bytes += nbytes

    def begin(self, number: int = 0) -> None:
        """Begin the run of this number: no output is written before the client's work is done.

        Release the owners of finished copies.
        """
        if self._held:  # release before the stream waits for the client
            if len(self._held) > _MOST_HELD or self._held_bytes > _MOST_HELD_BYTES:
                self.finish()
            elif self._has_passed():
                self._let_go()
        self._expect(number)
        self.wait(self.stream)

    def end(self) -> None:
        """End a run: from now on the client may wait for the outputs."""
        self.finish()

    def finish(self) -> None:
        """Wait for all of this lane's work on the GPU."""
        self.device.synchronize(self.stream)
        self._let_go()

    def is_stuck(self, patience_s: float) -> bool:
        """Whether this lane's GPU work still waits for a lost client after `patience_s`."""
        return False

    def close(self) -> None:
        """Wait for this lane's work and release everything.

        After a GPU failure there is no work to wait for.
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
        """Whether the GPU has certainly finished the last run."""
        return False

    def _release(self) -> None:
        """Release the events or words of the two sides."""

    def _let_go(self) -> None:
        self._held.clear()
        self._held_bytes = 0


class TurnByWords(Turn):
    """Stream-ordered turns through two counters in a slab: no CPU thread waits."""

    def __init__(
        self,
        device: Device,
        pointer: int,
        stream: int | None,
        is_connected: Callable[[], bool] = lambda: True,
    ) -> None:
        """Begin to take turns through the words at a pointer.

        `is_connected` reports whether the client may still write the words.

        Raises:
          CudaError: this process does not see the client's writes to the words.
        """
        if not device.has_words:
            raise CudaError("this CUDA driver has no 64-bit stream memory operations")
        self._words = words = Words(
            device, pointer, device.new_urgent_stream(), is_clients=False
        )
        self._number = FIRST
        self._is_connected = is_connected
        try:
            if not words.pass_within(FIRST, PROBE_S):
                raise CudaError(
                    "a stream of this process does not see the client's word"
                )
            words.write(FIRST, words.stream)
            super().__init__(device, stream)
            self._done = device.new_event()
        except BaseException:
            # End the wait from another stream, since the first stream waits itself.
            with contextlib.suppress(CudaError):
                Words(
                    device, pointer, device.new_urgent_stream(), is_clients=False
                ).release(FIRST)
            words.close()
            raise

    def wait(self, stream: int | None) -> None:
        if stream is not None:
            self._words.wait(self._number, stream)
        else:
            self._wait_here(None)

    def end(self) -> None:
        self._words.write(self._number, self.stream)
        # Querying an event is cheaper than a word.
        self.device.record(self._done, self.stream)

    def is_stuck(self, patience_s: float) -> bool:
        """Write the missing word in place of a client that is gone, and return False.

        Nobody reads the outputs.
        """
        with contextlib.suppress(CudaError):
            self._wait_here(patience_s)
        return False

    def _wait_here(self, patience_s: float | None) -> None:
        deadline = None if patience_s is None else time.monotonic() + patience_s
        while not self._words.comes_within(self._number, _POLL_S):
            if not self._is_connected() or (
                deadline is not None and time.monotonic() > deadline
            ):
                _log.info(
                    "a client ended before its GPU work was done; the call reads unfinished inputs"
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
    """Stream-ordered turns through one CUDA event per side: no CPU thread waits.

    Each side records its event after its work. If a process is killed before its GPU reaches the
    event, CUDA never records the event. A stream that waits for the event then waits forever.
    """

    def __init__(
        self, device: Device, ready: int, stream: int | None, *, is_shared: bool = True
    ) -> None:
        """Begin to take turns, and take ownership of `ready`, the client's event.

        `done` is the event of this side; another process can open the event if `is_shared`.
        """
        super().__init__(device, stream)
        self._ready: int | None = ready
        self.done = device.new_event(is_shared=is_shared)
        # Recorded after the wait for the client's event, since the client may destroy its event.
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
    """Begin to take turns with a client that offers words at a pointer or an event's handle.

    Fall back to waiting on the CPU if words or event do not work here.
    """
    try:
        if words is not None:
            return TurnByWords(device, words, stream, is_connected)
        if event:
            return TurnByEvents(device, device.open_event(event), stream)
    except CudaError as error:
        _log.warning(
            "a client's %s cannot be used: %s", "event" if event else "words", error
        )
    return Turn(device, stream)
