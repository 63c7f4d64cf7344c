"""The local lane's end of a Unix socket: frames, descriptors and the wait for a reply. Used by both sides."""

import array
import contextlib
import os
import select
import socket
import struct
import time

from bridge_wire.copying import usable_cores
from bridge_wire.errors import ProtocolError
from bridge_wire.frames import FrameDecoder, encode

_BUFFER_BYTES = 64 << 10
# An int, since an IntFlag costs a microsecond on each use. Linux's alone: elsewhere no descriptors come this way.
_CLOSE_ON_EXEC = int(getattr(socket, "MSG_CMSG_CLOEXEC", 0))
# A blocked peer takes 50 to 100 us to wake, so after recent traffic a message is polled for, for this long. Much
# shorter, and two sides that block keep each other waiting longer than either polls (measured, 2 virtual cores).
_SPIN_S = 200e-6
# Where messages are expected later than this, polling would only take a core from whoever computes them. What is
# expected is a moving average of the last waits, none counted as longer than the limit.
_SOON_S = 2 * _SPIN_S
_LONGEST_COUNTED_S = 4 * _SOON_S
_MAX_DESCRIPTORS = 4
_ANCILLARY_BYTES = socket.CMSG_SPACE(_MAX_DESCRIPTORS * array.array("i").itemsize)
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


class FramedSocket:
    """Sends and receives whole messages over a connected Unix stream socket, which it owns. For one thread.

    Descriptors that come with a message are dropped unless it `takes_descriptors`.
    """

    def __init__(self, connected: socket.socket, *, takes_descriptors: bool = False) -> None:
        self._socket = connected
        self._decoder = FrameDecoder()
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        # On one core, whoever spins keeps the peer from running.
        self._may_spin = usable_cores() > 1
        self._waited_s = 0.0  # the last time
        self._expected_s = 0.0
        self._takes_descriptors = takes_descriptors
        poll = select.poll()
        poll.register(connected, select.POLLIN)
        self._poll = poll.poll
        self._descriptors: list[int] = []

    def send(self, payload: bytes, descriptors: tuple[int, ...] = ()) -> None:
        """Send one message, and file descriptors with it.

        Raises:
          OSError: the peer is gone; it has not received the whole message.
        """
        frame = encode(payload)
        if descriptors:
            frame = frame[socket.send_fds(self._socket, [frame], descriptors) :]
        if frame:  # nothing is left to fail of what went out whole
            self._socket.sendall(frame)

    def receive(self, timeout_s: float | None = None) -> bytes | None:
        """Return the next message, or None when the peer has ended the connection.

        Raises:
          TimeoutError: nothing came within `timeout_s` seconds.
          ProtocolError: the bytes are no frames.
          OSError: the connection broke.
        """
        message = self._decoder.next()
        while message is None:
            self._wait(timeout_s)
            count = self._read()
            if count == 0:
                return None
            message = self._decoder.feed(self._view[:count])
        return message

    def take_descriptors(self) -> list[int]:
        """Return the descriptors that have come since the last call; the caller owns them."""
        taken, self._descriptors = self._descriptors, []
        return taken

    def peer_uid(self) -> int:
        """Return the user id of the peer, as the kernel knows it."""
        credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return _CREDENTIALS.unpack(credentials)[1]

    def has_ended(self) -> bool:
        """Whether the peer has closed its end; what it still says is dropped. Never blocks."""
        try:
            while self._socket.recv_into(self._buffer, 0, socket.MSG_DONTWAIT):
                pass
            return True
        except BlockingIOError:
            return False
        except OSError:
            return True

    def stop_receiving(self) -> None:
        """Let nothing more come in, and wake whoever waits for it here; what is under way can still be answered."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)

    def half_close(self) -> None:
        """Tell the peer that nothing more will come, but go on listening for its end."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the connection and every descriptor that came with it unclaimed. Idempotent."""
        self._socket.close()
        for fd in self.take_descriptors():
            os.close(fd)

    def _wait(self, timeout_s: float | None) -> None:
        """Wait until there is something to read; by polling first, where that is likely to save a wake-up."""
        # What nobody waits for is done first: once a message is there, each step delays its answer.
        poll, clock, give_way = self._poll, time.perf_counter, os.sched_yield
        self._expected_s += (min(self._waited_s, _LONGEST_COUNTED_S) - self._expected_s) / 2
        started = clock()
        if self._may_spin and self._expected_s < _SOON_S:
            deadline = started + _SPIN_S
            while not poll(0):
                if clock() > deadline:
                    break
                give_way()  # where both sides share a core, the peer must run first
            else:
                self._waited_s = clock() - started
                return
        if not poll(None if timeout_s is None else timeout_s * 1000):
            raise TimeoutError
        self._waited_s = clock() - started

    def _read(self) -> int:
        """Read what is there, or else wait for it; return the number of bytes."""
        try:
            if not self._takes_descriptors:
                return self._socket.recv_into(self._buffer)
            count, ancillary, _, _ = self._socket.recvmsg_into([self._buffer], _ANCILLARY_BYTES, _CLOSE_ON_EXEC)
        except ConnectionResetError:
            return 0
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
                self._descriptors.extend(fds)
                if len(self._descriptors) > _MAX_DESCRIPTORS:  # of a message that never ends, or of many
                    raise ProtocolError(f"more than {_MAX_DESCRIPTORS} descriptors came that no message has claimed")
        return count
