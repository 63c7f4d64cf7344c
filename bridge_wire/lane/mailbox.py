"""Mailbox: memory mapped by both ends of a local lane, with one message slot per direction.

A polling reader finds a message without a system call: an exchange takes 2 µs by a mailbox and 9 µs
by a Unix socket (2 virtual cores). A sleeping reader sleeps on the lane's socket.

Each direction has a slot of 4096 bytes. The slot starts with little-endian 64-bit numbers:

    0    number of messages put by the writer
    8    length of the last message in bytes
    64   number of messages taken by the reader
    72   state of the reader: 0 absent, 1 awake (polls, or will poll before sleeping),
         2 asleep (needs a wake-up)
    128  the last message

There is no lock, and Python has no memory barrier. The protocol relies on stores becoming visible
in program order, as on x86: a message is visible before its number, and a reader that falls asleep
sees a number in time.
"""

import platform

from bridge_wire.errors import ProtocolError

NBYTES = 8192
CAPACITY = 4096 - 128  # maximum message size; longer messages use the socket
ABSENT, AWAKE, ASLEEP = 0, 1, 2

_SLOT = 4096
_PUT, _LENGTH, _TAKEN, _STATE = 0, 1, 8, 9
_BODY = 128


def is_usable() -> bool:
    """Whether this machine's processors make stores visible in program order."""
    return platform.machine().lower() in ("x86_64", "amd64")


class Mailbox:
    """One end of a mailbox.

    The peer may be hostile: its messages are copied before validation.
    """

    def __init__(self, memory: memoryview, *, is_first: bool) -> None:
        """Use `NBYTES` zeroed bytes; exactly one of the two ends passes is_first=True."""
        first, second = memory[:_SLOT], memory[_SLOT:NBYTES]
        outgoing, incoming = (first, second) if is_first else (second, first)
        self._outgoing, self._incoming = outgoing.cast("Q"), incoming.cast("Q")
        self._to_send, self._received = outgoing[_BODY:], incoming[_BODY:]
        self._put = self._taken = 0
        self._incoming[_STATE] = AWAKE

    def put(self, message: bytes) -> int:
        """Put a message for the peer; return the peer's state.

        AWAKE: the peer polls. ASLEEP: the caller must wake the peer. ABSENT: nothing was put, since
        the peer has no mailbox, the message is too long, or the slot is occupied.
        """
        slot = self._outgoing
        if (
            slot[_STATE] == ABSENT
            or len(message) > CAPACITY
            or slot[_TAKEN] != self._put
        ):
            return ABSENT
        self._to_send[: len(message)] = message
        slot[_LENGTH] = len(message)
        self._put += 1
        slot[_PUT] = self._put
        return slot[_STATE]  # must be read after the number is written; see `sleep`

    def is_unread(self) -> bool:
        """Whether the peer has not taken the last message yet."""
        return self._outgoing[_TAKEN] != self._put

    def has_message(self) -> bool:
        return self._incoming[_PUT] != self._taken

    def take(self) -> bytes:
        """Return the message in the slot.

        Raises:
          ProtocolError: the message is longer than a slot.
        """
        slot = self._incoming
        self._taken, length = slot[_PUT], slot[_LENGTH]
        if length > CAPACITY:
            raise ProtocolError(
                f"the mailbox announces a message of {length} bytes; the limit is {CAPACITY}"
            )
        message = bytes(self._received[:length])
        slot[_TAKEN] = self._taken
        return message

    def sleep(self) -> None:
        """Request wake-ups from now until `wake`.

        Check for a message again a little later: if both sides act within the nanoseconds of a
        store, neither this end sees the message nor the peer the request.
        """
        self._incoming[_STATE] = ASLEEP

    def wake(self) -> None:
        """Decline wake-ups: this end polls before it sleeps."""
        self._incoming[_STATE] = AWAKE
