"""Unix socket of a local lane, for both sides: frames, descriptors, the wait for a reply.

With a mailbox, messages use the mailbox while both sides poll. The socket then serves wake-ups,
descriptors, long messages, and detection of the peer's end.
"""

import array
import contextlib
import functools
import os
import select
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from bridge_wire.errors import OutOfMemory, ProtocolError
from bridge_wire.lane import mailbox
from bridge_wire.lane.frames import FrameDecoder, encode
from bridge_wire.lane.mailbox import Mailbox
from bridge_wire.memory.copying import usable_cores
from bridge_wire.memory.slabs import create_slab, map_received

_BUFFER_BYTES = 64 << 10
# An int, since an IntFlag costs a microsecond per use. Linux only: other systems receive no
# descriptors here.
_CLOSE_ON_EXEC = int(getattr(socket, "MSG_CMSG_CLOEXEC", 0))
# Time to poll for a message after recent traffic, since a blocked peer takes 50 to 100 us to wake.
# With a much shorter time, two blocking sides delay each other for longer than either side polls
# (measured, 2 virtual cores).
_SPIN_S = 200e-6
# A side does not poll if it expects its message later than this: polling would take a core from the
# computation of the message. The expectation is a moving average of the last waits, each capped at
# _LONGEST_COUNTED_S.
_SOON_S = 2 * _SPIN_S
_LONGEST_COUNTED_S = 4 * _SOON_S
# After this time, a message put while this side fell asleep is visible.
_SETTLED_MS = 10
# Wakes a peer, or carries its mailbox; no message of the protocol is empty.
_NUDGE = b""
_MAX_DESCRIPTORS = 4
_ANCILLARY_BYTES = socket.CMSG_SPACE(_MAX_DESCRIPTORS * array.array("i").itemsize)
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


class FramedSocket:
    """Sends and receives whole messages over an owned Unix stream socket. For one thread.

    With a mailbox, the two sides must alternate: the second of two consecutive messages may arrive
    first.

    Received descriptors are dropped unless `takes_descriptors` is set.
    """

    def __init__(
        self, connected: socket.socket, *, takes_descriptors: bool = False
    ) -> None:
        self._socket = connected
        self._decoder = FrameDecoder()
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        # On one core, a polling side keeps its peer from running.
        self._may_spin = usable_cores() > 1
        self._waited_s = 0.0  # duration of the last wait
        self._expected_s = 0.0
        self._takes_descriptors = takes_descriptors
        poll = select.poll()
        poll.register(connected, select.POLLIN)
        self._poll = poll.poll
        self._descriptors: list[int] = []
        self._use(None)

    def offer_mailbox(self) -> None:
        """Offer a mailbox to the peer, which must accept descriptors.

        The mailbox is in use as soon as the peer has mapped it.
        """
        if not (self._may_spin and mailbox.is_usable()):
            return
        try:
            memory = create_slab(mailbox.NBYTES, 0, name="bridge-mailbox")
        # Most likely no free descriptor: the socket alone works too, more slowly.
        except OutOfMemory:
            return
        try:
            self.send(_NUDGE, (memory.fd,))
        finally:
            memory.close()
        self._use(Mailbox(memory.view, is_first=True))

    def send(self, payload: bytes, descriptors: tuple[int, ...] = ()) -> None:
        """Send one message together with file descriptors.

        Raises:
          OSError: the peer is gone and has not received the whole message.
        """
        if self._mailbox is not None and not descriptors:
            peer = self._mailbox.put(payload)
            if peer == mailbox.AWAKE:
                return
            if peer == mailbox.ASLEEP:
                payload = _NUDGE
        frame = encode(payload)
        if descriptors:
            frame = frame[socket.send_fds(self._socket, [frame], descriptors) :]
        if frame:  # sendall could fail even with nothing left to send
            self._socket.sendall(frame)

    def has_unread(self) -> bool:
        """Whether the last message is still in the mailbox. A peer that is gone then never
        received the message."""
        return self._mailbox is not None and self._mailbox.is_unread()

    def receive(self, timeout_s: float | None = None) -> bytes | None:
        """Return the next message, or None when the peer has closed the connection.

        Raises:
          TimeoutError: no message arrived within `timeout_s` seconds.
          ProtocolError: the bytes are no frames.
          OSError: the connection broke.
        """
        message = self._decoder.next()
        while not message:
            if message is not None:
                if self._mailbox is None and not self._takes_offer():
                    break  # an empty message without a mailbox
                message = self._decoder.next()
                continue
            box = self._mailbox
            if box is not None and box.has_message():
                return box.take()
            if self._wait(timeout_s):
                count = self._read()
                if count == 0:
                    return box.take() if box is not None and box.has_message() else None
                message = self._decoder.feed(self._view[:count])
        return message

    def take_descriptors(self) -> list[int]:
        """Return the descriptors received since the last call; the caller owns them."""
        taken, self._descriptors = self._descriptors, []
        return taken

    def peer_uid(self) -> int:
        """Return the peer's user id from the kernel."""
        credentials = self._socket.getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size
        )
        _, uid, _ = _CREDENTIALS.unpack(credentials)
        return int(uid)

    def has_ended(self) -> bool:
        """Whether the peer has closed its end. Drops pending bytes. Never blocks."""
        try:
            while self._socket.recv_into(self._buffer, 0, socket.MSG_DONTWAIT):
                pass
            return True
        except BlockingIOError:
            return False
        except OSError:
            return True

    def is_half_closed(self) -> bool:
        """Whether the peer will send nothing more. Never blocks."""
        try:
            flags = socket.MSG_PEEK | socket.MSG_DONTWAIT
            return not self._socket.recv(1, flags)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._socket.fileno()

    def is_connected(self) -> bool:
        """Whether the peer is connected, perhaps half-closed. Never blocks."""
        poll = select.poll()
        poll.register(self._socket, 0)
        return not any(events & select.POLLHUP for _, events in poll.poll(0))

    def stop_receiving(self) -> None:
        """Stop receiving, and wake the waiting thread; pending requests can still be answered."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)

    def half_close(self) -> None:
        """Shut down the sending direction, but keep detecting the peer's end."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the connection, the mailbox and all unclaimed descriptors. Idempotent."""
        self._socket.close()
        self._use(None)
        for fd in self.take_descriptors():
            os.close(fd)

    def _use(self, box: Mailbox | None) -> None:
        self._mailbox = box
        self._is_there: Callable[[], Any] = (
            functools.partial(self._poll, 0) if box is None else box.has_message
        )

    def _takes_offer(self) -> bool:
        """Map the mailbox offered by an empty message; return whether there was an offer."""
        if not self._descriptors:
            return False
        memory = map_received(self._descriptors.pop(), mailbox.NBYTES, 0)
        self._use(Mailbox(memory.view, is_first=False))
        return True

    def _wait(self, timeout_s: float | None) -> bool:
        """Wait for a message; return True if the socket is readable, False for the mailbox.

        Polls first if a poll is likely to save a wake-up.
        """
        # Bookkeeping first, off the critical path: after a message's arrival, each step delays its
        # answer.
        is_there, clock, give_way = self._is_there, time.perf_counter, os.sched_yield
        self._expected_s += (
            min(self._waited_s, _LONGEST_COUNTED_S) - self._expected_s
        ) / 2
        started = clock()
        if self._may_spin and self._expected_s < _SOON_S:
            deadline = started + _SPIN_S
            while not is_there():
                if clock() > deadline:
                    break
                give_way()  # if both sides share a core, the peer must run first
            else:
                self._waited_s = clock() - started
                return self._mailbox is None
        is_readable = self._sleep(timeout_s)
        self._waited_s = clock() - started
        return is_readable

    def _sleep(self, timeout_s: float | None) -> bool:
        """Wait like `_wait`, without polling."""
        box, left_ms = self._mailbox, None if timeout_s is None else timeout_s * 1000
        if box is not None:
            box.sleep()
            try:
                if box.has_message():
                    return False
                if self._poll(
                    _SETTLED_MS if left_ms is None else min(_SETTLED_MS, left_ms)
                ):
                    return True
                if box.has_message():
                    return False
                if self._poll(
                    None if left_ms is None else max(0, left_ms - _SETTLED_MS)
                ):
                    return True
            finally:
                box.wake()
        elif self._poll(left_ms):
            return True
        raise TimeoutError

    def _read(self) -> int:
        """Read available bytes, or wait for some; return the number of bytes."""
        try:
            if not self._takes_descriptors:
                return self._socket.recv_into(self._buffer)
            count, ancillary, _, _ = self._socket.recvmsg_into(
                [self._buffer], _ANCILLARY_BYTES, _CLOSE_ON_EXEC
            )
        except ConnectionResetError:
            return 0
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
                self._descriptors.extend(fds)
                # They come from one endless message, or from many messages.
                if len(self._descriptors) > _MAX_DESCRIPTORS:
                    raise ProtocolError(
                        f"the peer sent more than {_MAX_DESCRIPTORS} descriptors without a message"
                        " that uses them"
                    )
        return count
