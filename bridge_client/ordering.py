"""Ordering: how a lane's calls wait for this process's work on the GPU, and that work for the calls."""

import logging
from collections.abc import Callable

from bridge_wire.cuda import Device, driver
from bridge_wire.cuda_memory import leave_event
from bridge_wire.errors import CudaError
from bridge_wire.pb import bridge_pb2 as pb

_log = logging.getLogger(__name__)


class Ordering:
    """The order between one lane's calls and what is on this process's streams.

    With events, which both sides open once, neither waits on the host: a call waits on the GPU for what was on the
    stream before it, and what comes on the stream afterwards for the call. Where events cannot be had, this process
    waits until its stream is done before it calls, and the worker until the GPU is done before it answers.
    """

    def __init__(self, device: Device, ask: Callable[[pb.LaneRequest], pb.LaneReply]) -> None:
        """Come to terms with the worker over a lane, by its way to ask."""
        self._device = device
        self._ours: int | None = None
        self._theirs: int | None = None
        reason = "the worker cannot open this process's events"
        try:
            self._ours = device.new_event()
            handle = device.event_handle_of(self._ours)
        except CudaError as error:
            handle, reason = b"", str(error)
        theirs = ask(_order(handle)).ordered.event
        if theirs:
            try:
                self._theirs = device.open_event(theirs)
            except CudaError as error:
                reason = str(error)
                ask(_order(b""))
        if self._theirs is None:
            _log.warning("each call waits for the GPU on the host, since %s", reason)

    @property
    def has_events(self) -> bool:
        """Whether no side waits on the host."""
        return self._theirs is not None

    def begin(self, stream: int) -> None:
        """Let the next call wait for what is on the stream."""
        if self._ours is None or self._theirs is None:
            self._device.synchronize(stream)
        else:
            self._device.record(self._ours, stream)

    def end(self, stream: int) -> None:
        """Let what comes on the stream wait for the last call."""
        if self._theirs is not None:
            self._device.wait(self._theirs, stream)

    @property
    def is_done(self) -> bool:
        """Whether the last call, and with it what it waited for, is done on the GPU."""
        return self._theirs is None or not driver().is_pending(self._theirs)

    def close(self) -> None:
        """Let go of the events, when nobody waits for them any more. For finalizers, too."""
        events, self._ours, self._theirs = (self._ours, self._theirs), None, None
        for event in events:
            if event is not None:
                leave_event(self._device, event)


def _order(event: bytes) -> pb.LaneRequest:
    return pb.LaneRequest(order=pb.Order(event=event))
