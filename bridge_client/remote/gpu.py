"""Ordering of a lane's calls with this process's GPU work: by words, events or the CPU."""

import logging
import os
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from bridge_wire.errors import CallerError, CudaError, OutOfMemory
from bridge_wire.memory.cuda import driver
from bridge_wire.memory.cuda_memory import GpuPool, leave, leave_event
from bridge_wire.memory.cuda_words import (
    EVENTS,
    FIRST,
    HOST,
    PROBE_S,
    WAYS,
    WORDS,
    Words,
)
from bridge_wire.memory.pool import Block
from bridge_wire.pb import bridge_pb2 as pb

_log = logging.getLogger(__name__)

_SETTING = "BRIDGE_GPU_ORDER"
_MOST_UNREAD = 64  # number of calls between checks for finished calls
_NOT_A_NUMBER = 0xFF  # byte of a NaN, for all float types

Ask = Callable[[pb.LaneRequest], pb.LaneReply]


class Ordering:
    """Orders one lane's calls with this process's streams, in the first way that works here.

    By words or events, no side blocks the CPU: a call waits on the GPU for the stream's earlier
    work, and the stream's later work waits for the call. Otherwise this process waits for its
    stream before a call, and the worker waits for the GPU before an answer.
    """

    def __init__(self, pool: GpuPool, ask: Ask) -> None:
        """Agree on a way with the worker, which has the pool's slabs; `ask` uses the lane."""
        first = configured_way()
        reasons: list[str] = []
        self._by: _Way | None = None
        for way, kind in ((WORDS, _ByWords), (EVENTS, _ByEvents)):
            if self._by is None and WAYS.index(first) <= WAYS.index(way):
                try:
                    self._by = kind(pool, ask)
                except (CudaError, OutOfMemory) as error:
                    reasons.append(f"{way}: {error}")
        if self._by is None:
            ask(_order())
            why = "; ".join(reasons) or f"{_SETTING}={first}"
            _log.warning("each call waits for the GPU on the host, since %s", why)
        self._device = pool.device

    @property
    def way(self) -> str:
        """The way of waiting for the other side: "words", "events" or "host"."""
        return HOST if self._by is None else self._by.name

    def begin(self, stream: int) -> int:
        """Make the next call wait for the stream's present work.

        Returns the number of the call's turn, for the worker.
        """
        if self._by is None:
            self._device.synchronize(stream)
            return 0
        return self._by.begin(stream)

    def end(self, stream: int, outputs: Sequence[Block] = ()) -> None:
        """Make later work on the stream wait for the last call; its outputs lie in these
        blocks."""
        if self._by is not None:
            self._by.end(stream, outputs)

    @property
    def is_done(self) -> bool:
        """Whether the last call, and the work before it, is done on the GPU."""
        return self._by is None or self._by.is_done

    def worker_has_gone(self) -> None:
        """End the waits for a worker that is gone. Its unwritten outputs become NaN."""
        if self._by is not None:
            self._by.worker_has_gone()

    @property
    def has_lost_outputs(self) -> bool:
        """Whether the worker died before it had written outputs of answered calls."""
        return self._by is not None and self._by.has_lost_outputs

    def let_go(self) -> None:
        """Release the worker's resources while the worker is alive. No call may follow."""
        if self._by is not None:
            self._by.let_go()

    def close(self) -> None:
        """Queue the release of all resources, after the last wait for them. For finalizers too."""
        by, self._by = self._by, None
        if by is not None:
            by.close()


def configured_way() -> str:
    """Return the first way that a lane may use, from BRIDGE_GPU_ORDER."""
    way = os.environ.get(_SETTING, WORDS)
    if way not in WAYS:
        raise CallerError(f"{_SETTING}={way!r}; expected one of {', '.join(WAYS)}")
    return way


class _Way(ABC):
    """One way to order calls without blocking the CPU."""

    name: str

    @abstractmethod
    def begin(self, stream: int) -> int: ...

    @abstractmethod
    def end(self, stream: int, outputs: Sequence[Block]) -> None: ...

    @property
    @abstractmethod
    def is_done(self) -> bool: ...

    has_lost_outputs = False

    @abstractmethod
    def worker_has_gone(self) -> None: ...

    @abstractmethod
    def let_go(self) -> None: ...

    @abstractmethod
    def close(self) -> None: ...


class _Answered(NamedTuple):
    """An answered call with the locations of its outputs, which may not be written yet."""

    turn: int
    outputs: Sequence[tuple[int, int]]  # pointers and sizes


class _ByWords(_Way):
    """Ordering by two counters in a slab: streams write them and wait for them.

    Each call has a number. If the stream changes between two calls, the second call first waits for
    the first call's number in this side's word. Otherwise the second number, which is greater,
    could be written first and would start the first call too early.
    """

    name = WORDS

    def __init__(self, pool: GpuPool, ask: Ask) -> None:
        device = pool.device
        if not device.has_words:
            raise CudaError(
                "this driver's streams can neither write nor await 64-bit words"
            )
        self._pool, self._device = pool, device
        stream = device.new_urgent_stream()
        try:
            self._block = pool.lease_words(stream)
        except BaseException:
            device.destroy_stream(stream)
            raise
        self._words = Words(device, self._block.pointer, stream, is_clients=True)
        self._begun = self._ended = FIRST
        self._stream: int | None = None
        self._answered: deque[_Answered] = deque()
        self._lock = threading.Lock()
        self._is_worker_gone = False
        try:
            self._words.clear()
            self._words.write(FIRST, stream)
            if not ask(_order(words=self._block.address)).ordered.by_words:
                raise CudaError("the worker cannot wait for words here")
            if not self._words.comes_within(
                FIRST, PROBE_S
            ) or not self._words.pass_within(FIRST, PROBE_S):
                raise CudaError(
                    "a stream here does not see the word written by the worker"
                )
        except BaseException:
            self._words.close()
            raise

    def begin(self, stream: int) -> int:
        if stream != self._stream:
            self._words.wait_for_own(self._begun, stream)
            self._stream = stream
        self._begun += 1
        self._words.write(self._begun, stream)
        return self._begun

    def end(self, stream: int, outputs: Sequence[Block]) -> None:
        with self._lock:
            if self._ended != self._begun:
                self._ended = self._begun
                self._answered.append(
                    _Answered(
                        self._begun,
                        [(block.pointer, block.nbytes) for block in outputs],
                    )
                )
                if len(self._answered) % _MOST_UNREAD == 0:
                    self._forget_done()
        self._words.wait(self._begun, stream)
        if self._is_worker_gone:  # the worker died after its answer
            self.worker_has_gone()

    @property
    def is_done(self) -> bool:
        return self._words.theirs() >= self._ended

    def worker_has_gone(self) -> None:
        with self._lock:
            self._is_worker_gone = True
            self._forget_done()
            if not self._answered:
                return
            _log.error(
                "the worker died before its GPU had written the outputs of %d calls: the outputs"
                " are NaN now, integers -1; repeat the calls",
                len(self._answered),
            )
            self.has_lost_outputs = True
            for _, outputs in self._answered:
                for pointer, nbytes in outputs:
                    if nbytes:
                        self._device.fill(
                            pointer, _NOT_A_NUMBER, nbytes, self._words.stream
                        )
            self._answered.clear()
            self._words.release(self._ended)

    def let_go(self) -> None:
        pass

    def close(self) -> None:
        leave(_end_words, self)

    def _forget_done(self) -> None:
        done = self._words.theirs()
        while self._answered and self._answered[0].turn <= done:
            self._answered.popleft()

    def give_back(self) -> None:
        """Release the words; only words without pending writes are reused."""
        if self.is_done and self._words.mine() >= self._begun:
            self._pool.give_back_words(self._block)
        self._words.close()


def _end_words(words: _ByWords) -> None:
    words.give_back()


class _ByEvents(_Way):
    """Ordering by one interprocess event per side, opened by the other side."""

    name = EVENTS

    def __init__(self, pool: GpuPool, ask: Ask) -> None:
        self._device = device = pool.device
        self._ours = device.new_event(is_shared=True)
        self._theirs: int | None = None
        try:
            theirs = ask(_order(event=device.event_handle_of(self._ours))).ordered.event
            if not theirs:
                raise CudaError("the worker cannot open this process's events")
            self._theirs = device.open_event(theirs)
        except BaseException:
            self.close()
            raise

    def begin(self, stream: int) -> int:
        self._device.record(self._ours, stream)
        return 0

    def end(self, stream: int, outputs: Sequence[Block]) -> None:
        if self._theirs is not None:
            self._device.wait(self._theirs, stream)

    @property
    def is_done(self) -> bool:
        return self._theirs is None or not driver().is_pending(self._theirs)

    def worker_has_gone(self) -> None:
        pass  # waits for a dead process's event never end

    def let_go(self) -> None:
        # Must come before the owner destroys its event: CUDA leaves later use undefined.
        theirs, self._theirs = self._theirs, None
        if theirs is not None:
            self._device.destroy_event(theirs)

    def close(self) -> None:
        # If the lane has ended first, the worker's event is not destroyed: its destruction is
        # undefined too.
        self._theirs = None
        leave_event(self._device, self._ours)


def _order(*, event: bytes = b"", words: int = 0) -> pb.LaneRequest:
    return pb.LaneRequest(order=pb.Order(event=event, words=words))
