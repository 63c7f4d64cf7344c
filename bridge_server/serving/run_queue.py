"""The queue of runs: few at once, in fair turns between sessions. Imports no framework.

A device computes several runs at once no faster than one after another, but then every run takes
as long as all of them. So at most `most` runs are under way. One of these places is kept for a
session that has no run under way: its short run waits for no long one. Sessions whose runs wait
take turns, whatever the number of runs each of them has waiting.

Runs that wait for something else than the processor, such as a host callback that sleeps or calls
this worker again, hold places without using them. While the processor idles, there are additional
places, up to `_MOST_AT_ONCE` in total; not where a number of places was asked for, and not on a
GPU, whose work leaves the processor idle too.

Runs may wait for runs that wait for them: a callback may call this worker again. So if no run has
ended for some seconds, though the processor idles, one more begins, whatever the limits.
"""

import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable

from bridge_wire.errors import WorkerBusy
from bridge_wire.memory.copying import usable_cores
from bridge_wire.pb import bridge_pb2 as pb

# XLA's runtime for CPUs stops for ever where some hundred host callbacks are under way.
_MOST_AT_ONCE = 32
_TICK_S = 0.05
# The processor idles for this worker if the worker uses less than this share of its cores, and the
# machine has as much left; or if the worker does nearly nothing.
_USED, _LEFT = 0.5, 0.25
_NEARLY_NOTHING = 0.1  # of one core
_STANDSTILL_TICKS = 40  # after which one more run begins at each tick
_ABANDONED_TICKS = 2  # until a waiting run looks for its client again
_LONGEST_HINT_S = 5.0


class Client:
    """One client's share of the queue. The queue's lock guards it."""

    __slots__ = ("running", "waiting")

    def __init__(self) -> None:
        self.running = 0
        self.waiting: deque[_Ticket] = deque()


class _Ticket:
    """A run that waits for its turn."""

    __slots__ = ("came", "client", "may_begin")

    def __init__(self, client: Client) -> None:
        self.client = client
        self.came = time.monotonic()
        self.may_begin = threading.Event()


class RunQueue:
    """Lets at most so many runs begin at once. Thread-safe."""

    def __init__(
        self,
        most: int | None,
        most_waiting: int,
        *,
        may_grow: bool = True,
    ) -> None:
        """Begin empty.

        `most` runs at once; None means one more than there are cores, and more while the processor
        idles if `may_grow`.
        """
        self._may_grow = may_grow and most is None
        self.most = most or usable_cores() + 1
        self.most_waiting = most_waiting
        self.running = self.waiting = self.refused = 0
        self._extra = 0  # places for runs that do not use the processor
        self._beyond = 0  # places for runs that others may wait for
        self._standstill = 0  # ticks
        self._count_places()
        self._lock = threading.Lock()
        # Clients with waiting runs, the next one first.
        self._turns: OrderedDict[Client, None] = OrderedDict()
        self._is_watched = False
        self._ended = 0
        self._mean_s = 0.0

    def enter(self, client: Client, is_abandoned: Callable[[], bool]) -> float:
        """Begin a run, after waiting for its turn if necessary; `leave` must follow.

        Returns the seconds that the run has waited.

        Raises:
          WorkerBusy: too many runs wait already.
          Abandoned: the run's client no longer waits for it.
        """
        with self._lock:
            # Whoever waits has no place: every end of a run lets those begin who have one.
            if not client.waiting and self._has_place(client):
                self.running += 1
                client.running += 1
                return 0.0
            ticket = self._enqueue(client)
        try:
            while not ticket.may_begin.wait(_TICK_S * _ABANDONED_TICKS):
                if is_abandoned():
                    raise Abandoned
            if is_abandoned():
                raise Abandoned
        except BaseException:
            if not self._withdraw(ticket):
                self.leave(client)
            raise
        return time.monotonic() - ticket.came

    def leave(self, client: Client) -> None:
        """End a run."""
        with self._lock:
            self.running -= 1
            client.running -= 1
            if self._turns:
                self._ended += 1
                self._admit()

    def describe(self, numbers: pb.Statistics) -> None:
        """Add this queue's numbers to the worker's."""
        numbers.running, numbers.waiting = self.running, self.waiting
        numbers.refused = self.refused

    def _has_place(self, client: Client) -> bool:
        # The last place is for a client without a run.
        most = self._places
        return self.running < (most - 1 if client.running and most > 1 else most)

    def _count_places(self) -> None:
        """Note how many runs may be under way; each run looks at it."""
        grown = min(self.most + self._extra, max(self.most, _MOST_AT_ONCE))
        self._places = grown + self._beyond

    def _enqueue(self, client: Client) -> _Ticket:
        if self.waiting >= self.most_waiting:
            self.refused += 1
            raise WorkerBusy(
                f"{self.waiting} calls wait for the worker already, its limit; make fewer calls at"
                " once, or try again later",
                retry_after_s=self._hint_s(),
            )
        if not self._is_watched:
            # First, since the system may have no thread left.
            threading.Thread(target=self._watch, name="run-queue", daemon=True).start()
            self._is_watched = True
        ticket = _Ticket(client)
        client.waiting.append(ticket)
        self._turns.setdefault(client)
        self.waiting += 1
        return ticket

    def _admit(self) -> None:
        """Let waiting runs begin while there is room, each client in its turn."""
        for client in list(self._turns):
            if not self._has_place(client):
                continue
            ticket = client.waiting.popleft()
            self._turns.move_to_end(client)
            self._note_end_of_wait(client)
            self.running += 1
            client.running += 1
            ticket.may_begin.set()

    def _withdraw(self, ticket: _Ticket) -> bool:
        """Take a waiting run out; return whether it had not begun."""
        with self._lock:
            if ticket.may_begin.is_set():
                return False
            ticket.client.waiting.remove(ticket)
            self._note_end_of_wait(ticket.client)
            return True

    def _note_end_of_wait(self, client: Client) -> None:
        self.waiting -= 1
        if not client.waiting:
            del self._turns[client]

    def _hint_s(self) -> float:
        """Return the seconds in which half of the waiting runs should have begun."""
        return min(self.waiting * self._mean_s / 2, _LONGEST_HINT_S)

    def _watch(self) -> None:
        """Add places while runs wait and the processor idles; take them back while it does not."""
        processor = _Processor()
        while True:
            time.sleep(_TICK_S)
            is_idle = processor.has_idled()
            with self._lock:
                self._mean_s = _TICK_S / max(1, self._ended)
                has_ended, self._ended = bool(self._ended), 0
                if not self._turns:
                    self._extra //= 2
                    self._beyond = self._standstill = 0
                    self._count_places()
                    self._is_watched = False
                    return
                if self._may_grow:
                    extra = self._extra * 2 + 1 if is_idle else self._extra // 2
                    self._extra = min(extra, _MOST_AT_ONCE)
                stands_still = is_idle and not has_ended
                self._standstill = self._standstill + 1 if stands_still else 0
                if self._standstill > _STANDSTILL_TICKS:
                    self._beyond += 1
                self._count_places()
                self._admit()


class _Processor:
    """Tells whether the processor has idled between two looks."""

    def __init__(self) -> None:
        self._cores = usable_cores()
        self._before = self._look()

    def has_idled(self) -> bool:
        now = self._look()
        wall_s, used_s, idle_s = (
            new - old for new, old in zip(now, self._before, strict=True)
        )
        self._before = now
        if used_s < _NEARLY_NOTHING * wall_s:
            return True
        is_used = used_s > _USED * self._cores * wall_s
        return not is_used and idle_s > _LEFT * self._cores * wall_s

    def _look(self) -> tuple[float, float, float]:
        """Return the seconds now, of this process's work, and of the machine's idle cores."""
        return time.monotonic(), time.process_time(), _idle_s()


def _idle_s() -> float:
    """Return the seconds that the machine's cores have idled; elsewhere than on Linux, 0."""
    try:
        with open("/proc/stat", "rb") as file:
            fields = file.readline().split()
    except OSError:
        return 0.0
    return int(fields[4]) / os.sysconf("SC_CLK_TCK")


class Abandoned(Exception):
    """The client of a waiting run is gone, or waits no more."""
