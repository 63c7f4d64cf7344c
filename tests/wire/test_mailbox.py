"""Mailboxes: one message each way in shared memory, alone and under a local lane's socket."""

import contextlib
import itertools
import mmap
import os
import random
import socket
import struct
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge_wire.errors import OutOfMemory, ProtocolError
from bridge_wire.lane import framed_socket, mailbox
from bridge_wire.lane.framed_socket import FramedSocket
from bridge_wire.lane.mailbox import ABSENT, ASLEEP, AWAKE, CAPACITY, NBYTES, Mailbox

pytestmark = pytest.mark.skipif(
    not mailbox.is_usable(),
    reason="stores of these processors may be seen out of order",
)


@pytest.fixture
def memory() -> memoryview:
    return memoryview(mmap.mmap(-1, NBYTES))


@pytest.fixture
def ends(memory: memoryview) -> tuple[Mailbox, Mailbox]:
    return Mailbox(memory, is_first=True), Mailbox(memory, is_first=False)


# The memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [b"x", b"\0" * 100, os.urandom(CAPACITY)],
    ids=["one byte", "zeros", "full"],
)
def test_message_is_there_until_it_is_taken(
    ends: tuple[Mailbox, Mailbox], message: bytes
) -> None:
    """Each end finds the other end's message, once."""
    for writer, reader in (ends, ends[::-1]):
        assert not reader.has_message()
        assert writer.put(message) == AWAKE
        assert writer.is_unread()
        assert reader.has_message()
        assert reader.take() == message
        assert not reader.has_message()
        assert not writer.is_unread()


def test_message_that_cannot_be_left_is_not(ends: tuple[Mailbox, Mailbox]) -> None:
    """A message that is too long, or comes before the last one was taken, leaves everything as
    it is."""
    writer, reader = ends
    assert writer.put(bytes(CAPACITY + 1)) == ABSENT
    assert not writer.is_unread()
    assert writer.put(b"first") == AWAKE
    assert writer.put(b"second") == ABSENT
    assert reader.take() == b"first"
    assert not reader.has_message()


def test_nothing_is_left_for_who_has_not_come(memory: memoryview) -> None:
    """Before the peer has mapped the memory, it would not look there."""
    writer = Mailbox(memory, is_first=True)
    assert writer.put(b"hello") == ABSENT
    reader = Mailbox(memory, is_first=False)
    assert not reader.has_message()
    assert writer.put(b"hello") == AWAKE


def test_writer_is_told_whether_to_wake_the_reader(
    ends: tuple[Mailbox, Mailbox],
) -> None:
    """A reader that sleeps has to be woken, until it says that it is awake."""
    writer, reader = ends
    reader.sleep()
    assert writer.put(b"wake up") == ASLEEP
    reader.wake()
    assert reader.take() == b"wake up"
    assert writer.put(b"good morning") == AWAKE


def test_message_is_the_reader_s_own(
    ends: tuple[Mailbox, Mailbox], memory: memoryview
) -> None:
    """A message that was taken does not change with the memory."""
    writer, reader = ends
    writer.put(b"as it was")
    taken = reader.take()
    memory[:] = bytes(NBYTES)
    assert taken == b"as it was"


@given(
    st.lists(
        st.tuples(st.integers(0, NBYTES // 8 - 1), st.integers(0, 2**64 - 1)),
        max_size=20,
    )
)
def test_any_memory_yields_a_message_or_a_protocol_error(
    stores: list[tuple[int, int]],
) -> None:
    """No more than a slot is read, for any bytes that the peer writes anywhere."""
    memory = memoryview(mmap.mmap(-1, NBYTES))
    reader = Mailbox(memory, is_first=False)
    for word, value in stores:
        memory.cast("Q")[word] = value
    if reader.has_message():
        with contextlib.suppress(ProtocolError):
            assert len(reader.take()) <= CAPACITY
    reader.put(b"an answer")


# Under a socket -----------------------------------------------------------------------------------


@contextlib.contextmanager
def pair() -> Iterator[tuple[FramedSocket, FramedSocket]]:
    """Two connected ends, the first of which has offered a mailbox that the second has taken."""
    a, b = (
        FramedSocket(end, takes_descriptors=True)
        for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    )
    with contextlib.closing(a), contextlib.closing(b):
        a.offer_mailbox()
        a.send(b"hello")
        assert b.receive(5) == b"hello"
        b.send(b"welcome")
        assert a.receive(5) == b"welcome"
        yield a, b


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mailboxes are for machines on which both sides can poll."""
    monkeypatch.setattr(framed_socket, "usable_cores", lambda: 2)


def waiting_in_socket(end: FramedSocket) -> bytes:
    """Return the bytes in the socket for this end, without taking them."""
    with contextlib.suppress(BlockingIOError):
        return end._socket.recv(1 << 20, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    return b""


def test_polling_side_gets_messages_without_the_socket() -> None:
    """To a side that is awake nothing is sent over the socket."""
    with pair() as (a, b):
        a.send(b"question")
        assert waiting_in_socket(b) == b""
        assert b.receive(5) == b"question"
        b.send(b"answer")
        assert waiting_in_socket(a) == b""
        assert a.receive(5) == b"answer"


@pytest.mark.parametrize("spin_s", [0, 200e-6])
def test_sides_that_take_turns_understand_each_other(
    monkeypatch: pytest.MonkeyPatch, spin_s: float
) -> None:
    """Messages of all lengths arrive, whether the other side polls, sleeps or is about to; also
    beyond a slot."""
    monkeypatch.setattr(framed_socket, "_SPIN_S", spin_s)
    # Who has missed a message would miss it for long.
    monkeypatch.setattr(framed_socket, "_SETTLED_MS", 20_000)
    lengths = [
        random.Random(0).choice([1, 60, CAPACITY, CAPACITY + 1, 70_000])
        for _ in range(2000)
    ]
    with pair() as (a, b):

        def echo() -> None:
            while (message := b.receive(5)) is not None:
                b.send(message)

        other = threading.Thread(target=echo)
        other.start()
        try:
            for i, length in enumerate(lengths):
                message = (b"%d " % i).ljust(length)[:length]
                a.send(message)
                assert a.receive(5) == message
        finally:
            a.half_close()
            other.join()


def test_sender_knows_what_a_peer_that_has_ended_never_took() -> None:
    """Of a peer that is gone, one can tell whether it has received the last message."""
    with pair() as (a, b):
        a.send(b"taken")
        assert b.receive(5) == b"taken"
        assert not a.has_unread()
        a.send(b"never taken")
        b.close()
        assert a.receive(5) is None
        assert a.has_unread()


def test_empty_message_only_wakes() -> None:
    """With a mailbox, a frame of no bytes is no message, however many come."""
    with pair() as (a, b):
        a._socket.sendall(bytes(4) * 3)
        a.send(b"something")
        assert b.receive(5) == b"something"
        a._socket.sendall(bytes(4))
        with pytest.raises(TimeoutError):
            b.receive(0.02)


def test_mailbox_leaves_no_descriptor() -> None:
    """Each side maps the memory, and keeps no descriptor of it."""
    before = len(os.listdir("/proc/self/fd"))
    with pair():
        assert len(os.listdir("/proc/self/fd")) == before + 2
    assert len(os.listdir("/proc/self/fd")) == before


def test_without_memory_the_socket_serves_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where no mailbox can be made, messages take the socket."""

    def refuse(*_: object, **__: object) -> None:
        raise OutOfMemory("no descriptor")

    monkeypatch.setattr(framed_socket, "create_slab", refuse)
    with pair() as (a, b):
        a.send(b"question")
        assert waiting_in_socket(b) == struct.pack("<I", 8) + b"question"
        assert b.receive(5) == b"question"


@pytest.mark.parametrize(
    "nbytes", [0, NBYTES // 2, NBYTES], ids=["empty", "too small", "unsealed"]
)
def test_bad_memory_is_a_protocol_error(nbytes: int) -> None:
    """A mailbox is a sealed memfd of its size and nothing else, and a bad one leaves nothing
    behind."""
    before = len(os.listdir("/proc/self/fd"))
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with contextlib.closing(FramedSocket(b, takes_descriptors=True)) as end, a:
        fd = os.memfd_create("bad", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, nbytes)
        socket.send_fds(a, [bytes(4)], [fd])
        os.close(fd)
        with pytest.raises(ProtocolError):
            end.receive(5)
    assert len(os.listdir("/proc/self/fd")) == before


def test_second_offer_is_no_message() -> None:
    """A peer that offers a mailbox again is not listened to, and its descriptors go with the
    connection."""
    before = len(os.listdir("/proc/self/fd"))
    with pair() as (a, b):
        fd = os.memfd_create("again")
        for _ in itertools.repeat(None, 3):
            socket.send_fds(a._socket, [bytes(4)], [fd])
        os.close(fd)
        a.send(b"still here")
        assert b.receive(5) == b"still here"
    assert len(os.listdir("/proc/self/fd")) == before
