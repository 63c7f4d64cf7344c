"""A mailbox: memory that both ends of a local lane map, with room for one message each way.

Whoever polls finds a message there without a system call; of an exchange over a Unix socket, most
is the kernel's work (on 2 virtual cores 9 µs, and 2 µs by a mailbox). Whoever sleeps does so on the
socket, and is woken by it.

Each way has a slot of 4096 bytes, which begins with numbers of 64 bits, little-endian:

    0    how many messages the writer has put here 8    the length of the last one in bytes 64   how
    many of them the reader has taken 72   the reader: 0 has not come yet, 1 polls or is busy and
    will look, 2 sleeps and must be woken 128  the last message

There is no lock, and Python has no memory barrier. That a message is there once its number is, and
that a number is seen in time by whoever falls asleep, holds where stores are seen in the order in
which they were made: on x86.
"""

import platform

from bridge_wire.errors import ProtocolError

NBYTES = 8192
CAPACITY = 4096 - 128  # of a message; longer ones go over the socket
ABSENT, AWAKE, ASLEEP = 0, 1, 2

_SLOT = 4096
_PUT, _LENGTH, _TAKEN, _STATE = 0, 1, 8, 9
_BODY = 128


def is_usable() -> bool:
    """Whether this machine's processors make stores visible in their order."""
    return platform.machine().lower() in ("x86_64", "amd64")


class Mailbox:
    """One end of a mailbox.

    The peer may be hostile: what it writes is copied before anybody looks at it.
    """

    def __init__(self, memory: memoryview, *, is_first: bool) -> None:
        """Use `NBYTES` bytes that are zero at first; of the two ends, one is the first."""
        first, second = memory[:_SLOT], memory[_SLOT:NBYTES]
        outgoing, incoming = (first, second) if is_first else (second, first)
        self._outgoing, self._incoming = outgoing.cast("Q"), incoming.cast("Q")
        self._to_send, self._received = outgoing[_BODY:], incoming[_BODY:]
        self._put = self._taken = 0
        self._incoming[_STATE] = AWAKE

    def put(self, message: bytes) -> int:
        """Leave a message for the peer; return whether it is AWAKE or must be woken, or that it is
        ABSENT.

        Then nothing was left: it has no mailbox, the message is too long, or the last one still
          lies there.
        """
        slot = self._outgoing
        if slot[_STATE] == ABSENT or len(message) > CAPACITY or slot[_TAKEN] != self._put:
            return ABSENT
        self._to_send[: len(message)] = message
        slot[_LENGTH] = len(message)
        self._put += 1
        slot[_PUT] = self._put
        return slot[_STATE]  # read after the number was written; see `sleep`

    def is_unread(self) -> bool:
        """Whether the last message that was put is one that the peer has not taken."""
        return self._outgoing[_TAKEN] != self._put

    def has_message(self) -> bool:
        return self._incoming[_PUT] != self._taken

    def take(self) -> bytes:
        """Return the message that is there.

        Raises:
          ProtocolError: it is longer than a slot.
        """
        slot = self._incoming
        self._taken, length = slot[_PUT], slot[_LENGTH]
        if length > CAPACITY:
            raise ProtocolError(
                f"a mailbox holds a message of {length} bytes; the limit is {CAPACITY}"
            )
        message = bytes(self._received[:length])
        slot[_TAKEN] = self._taken
        return message

    def sleep(self) -> None:
        """Ask to be woken from now on, and until `wake`.

        A peer that has not seen this may have put a message that is not seen here either, if both
        did so within the nanoseconds that a store needs: look again a little later.
        """
        self._incoming[_STATE] = ASLEEP

    def wake(self) -> None:
        """Ask not to be woken: this end will look before it sleeps."""
        self._incoming[_STATE] = AWAKE
