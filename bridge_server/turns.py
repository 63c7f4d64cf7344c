"""Turns on the GPU: what a lane's run waits for there, and what its client may wait for afterwards. No framework."""

import contextlib
import logging
import time
from typing import Any

from bridge_wire.cuda import Device, driver
from bridge_wire.errors import CudaError

_log = logging.getLogger(__name__)

# Past either, a lane waits for the GPU rather than hold more of what it has still to copy.
_MOST_HELD = 64
_MOST_HELD_BYTES = 256 << 20
_POLL_S = 0.002


class Turn:
    """How one lane's runs and its client's own work take turns on a GPU.

    With events, work is only put in order: a run waits on the GPU for what the client had put there before, and the
    client for what the run puts there. Without, each side has finished when it hands over.
    """

    def __init__(self, device: Device, client_event: bytes, stream: int | None) -> None:
        """Begin to take turns with the client whose event has this handle; without one if it has none, or cannot be
        opened here.

        `stream` is the one that the models of this thread run on; None gives the lane a stream of its own, to which the
        outputs are brought.
        """
        self.device = device
        self.event = b""  # the handle of this side's event
        self._ready: int | None = None
        self._done: int | None = None
        self._held: list[tuple[Any, ...]] = []
        self._held_bytes = 0
        self._owns_stream = stream is None
        self.stream = device.new_stream() if stream is None else stream
        if client_event:
            try:
                self._ready = device.open_event(client_event)
                self._done = device.new_event()
                self.event = device.event_handle_of(self._done)
            except CudaError as error:
                _log.warning("a client's event cannot be used, so both sides wait for the GPU at each call: %s", error)
                self._destroy_events()

    def wait(self, stream: int | None) -> None:
        """Let a stream wait until the inputs are there; without a stream, wait here."""
        if self._ready is not None:
            self.device.wait(self._ready, stream)

    def copy(self, target: int, source: int, nbytes: int, *owners: object) -> None:
        """Copy an output, once what is on this lane's stream is done. The owners are held until it has been copied."""
        self.device.copy(target, source, nbytes, self.stream)
        self._held.append(owners)
        self._held_bytes += nbytes

    def begin(self) -> None:
        """Begin a run: no output is written before the client's work is done. Let go of what has been copied by now."""
        self.wait(self.stream)
        if not self._held:
            return
        if len(self._held) > _MOST_HELD or self._held_bytes > _MOST_HELD_BYTES:
            self.finish()
        elif self._done is not None and driver().has_passed(self._done):
            self._let_go()

    def end(self) -> None:
        """End a run: from now on the client may wait for its outputs."""
        if self._done is None:
            self.finish()
        else:
            self.device.record(self._done, self.stream)

    def finish(self) -> None:
        """Wait until all that this lane has put on the GPU is done."""
        self.device.synchronize(self.stream)
        self._let_go()

    def is_stuck(self, patience_s: float) -> bool:
        """Whether this lane's work waits for a client that has ended, and has done so for that long.

        CUDA has nobody record the event of a process that was killed before its GPU came to it. What waits for that,
        and all that comes behind it on the stream, waits forever.
        """
        if self._ready is None or self._done is None:
            return False
        try:
            self.device.record(self._done, self.stream)  # other lanes may keep a stream busy that goes on
        except CudaError:
            return False
        deadline = time.monotonic() + patience_s
        while driver().is_pending(self._ready) and driver().is_pending(self._done):
            if time.monotonic() > deadline:
                return True
            time.sleep(_POLL_S)
        return False

    def close(self) -> None:
        """Finish, and let go of everything. Where the GPU has failed, there is nothing left to wait for."""
        with contextlib.suppress(CudaError):
            self.finish()
        self._let_go()
        self._destroy_events()
        if self._owns_stream:
            with contextlib.suppress(CudaError):
                self.device.destroy_stream(self.stream)

    def _let_go(self) -> None:
        self._held.clear()
        self._held_bytes = 0

    def _destroy_events(self) -> None:
        for event in (self._ready, self._done):
            if event is not None:
                with contextlib.suppress(CudaError):
                    self.device.destroy_event(event)
        self._ready = self._done = None
        self.event = b""
