"""One end of a local lane: whole messages, descriptors, time-outs and ends, over real socket
pairs."""

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from bridge_wire.errors import ProtocolError
from bridge_wire.lane.framed_socket import FramedSocket
from bridge_wire.lane.frames import MAX_FRAME, encode


@contextlib.contextmanager
def pair() -> Iterator[tuple[FramedSocket, FramedSocket]]:
    """Two connected ends, which take descriptors."""
    a, b = (
        FramedSocket(end, takes_descriptors=True)
        for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    )
    try:
        yield a, b
    finally:
        a.close()
        b.close()


@pytest.fixture(params=["socket", "mailbox"])
def either_pair(
    request: pytest.FixtureRequest,
) -> Iterator[tuple[FramedSocket, FramedSocket]]:
    """The same, without a mailbox and, where the machine has one to offer, with it."""
    with pair() as (a, b):
        if request.param == "mailbox":
            a.offer_mailbox()
            a.send(b"hello")
            assert b.receive(5) == b"hello"
        yield a, b


@contextlib.contextmanager
def raw_pair() -> Iterator[tuple[socket.socket, FramedSocket]]:
    """A plain socket, and the end under test connected to it."""
    raw, connected = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    end = FramedSocket(connected, takes_descriptors=True)
    try:
        yield raw, end
    finally:
        raw.close()
        end.close()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def some_descriptors(count: int) -> list[int]:
    return [os.memfd_create(f"sent-{i}") for i in range(count)]


def close_all(descriptors: list[int]) -> None:
    for fd in descriptors:
        os.close(fd)


# Messages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "payload", [b"", b"x", b"\0" * 1000], ids=["empty", "one byte", "zeros"]
)
def test_message_arrives_whole(payload: bytes) -> None:
    """A message sent by one end is received by the other, in both directions."""
    with pair() as (a, b):
        a.send(payload)
        assert b.receive(5) == payload
        b.send(payload + b"back")
        assert a.receive(5) == payload + b"back"


def test_messages_keep_their_order_and_borders() -> None:
    """Messages that are sent in one go are received one by one."""
    with pair() as (a, b):
        sent = [bytes([i]) * i for i in range(50)]
        for payload in sent:
            a.send(payload)
        assert [b.receive(5) for _ in sent] == sent


def test_message_that_comes_byte_by_byte_is_put_together() -> None:
    """However the stream is cut, a message is received once it is whole."""
    with raw_pair() as (raw, end):
        for byte in encode(b"slowly")[:-1]:
            raw.send(bytes([byte]))
            with pytest.raises(TimeoutError):
                end.receive(0)
        raw.send(b"y")
        assert end.receive(5) == b"slowly"


def test_largest_message_passes_though_it_exceeds_every_buffer() -> None:
    """A message of MAX_FRAME bytes, more than a socket holds, arrives while the sender still
    sends."""
    payload = os.urandom(MAX_FRAME)
    with pair() as (a, b):
        sender = threading.Thread(target=a.send, args=(payload,))
        sender.start()
        assert b.receive(30) == payload
        sender.join()


def test_oversized_message_is_refused_before_it_is_sent() -> None:
    """A message over the limit is a ProtocolError at the sender; the connection stays usable."""
    with pair() as (a, b):
        with pytest.raises(ProtocolError):
            a.send(bytes(MAX_FRAME + 1))
        a.send(b"fine")
        assert b.receive(5) == b"fine"


def test_oversized_frame_is_a_protocol_error_at_the_receiver() -> None:
    """A length over the limit ends the reading at once."""
    with raw_pair() as (raw, end):
        raw.send(struct.pack("<I", MAX_FRAME + 1))
        with pytest.raises(ProtocolError):
            end.receive(5)


# Time-outs and ends -------------------------------------------------------------------------------


def test_silence_is_a_timeout_and_costs_nothing(
    either_pair: tuple[FramedSocket, FramedSocket],
) -> None:
    """No message within the time is TimeoutError, and a later message is received whole."""
    a, b = either_pair
    for timeout_s in (0, 0.02):
        with pytest.raises(TimeoutError):
            b.receive(timeout_s)
    a.send(b"late")
    assert b.receive(5) == b"late"


def test_receive_without_a_timeout_waits() -> None:
    """Without a time-out a message is waited for, beyond the time that is spent polling."""
    with pair() as (a, b):
        ready = threading.Event()
        received: list[bytes | None] = []

        def wait() -> None:
            ready.set()
            received.append(b.receive())

        waiting = threading.Thread(target=wait)
        waiting.start()
        ready.wait()
        a.send(b"at last")
        waiting.join()
        assert received == [b"at last"]


def test_end_of_the_peer_is_none(
    either_pair: tuple[FramedSocket, FramedSocket],
) -> None:
    """When the peer closes, its messages are received first, and then None, repeatedly."""
    a, b = either_pair
    a.send(b"last words")
    a.close()
    assert b.receive(5) == b"last words"
    assert b.receive(5) is None
    assert b.receive() is None


def test_end_within_a_message_gives_no_message() -> None:
    """A peer that ends in the middle of a frame has sent no message: nothing is made up from the
    rest."""
    with raw_pair() as (raw, end):
        raw.send(encode(b"whole") + encode(b"cut in two")[:7])
        raw.close()
        assert end.receive(5) == b"whole"
        assert end.receive(5) is None


def test_reset_by_the_peer_is_an_end() -> None:
    """A peer that closes without having read all of what it was sent has ended the connection,
    no more."""
    with pair() as (a, b):
        b.send(b"never read")
        a.close()
        assert b.receive(5) is None


def test_sending_to_a_peer_that_is_gone_is_an_os_error() -> None:
    """A message to an end that is closed raises; the process does not die of a signal."""
    with pair() as (a, b):
        b.close()
        with pytest.raises(OSError):
            a.send(b"hello?")


def test_message_that_went_out_whole_is_no_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A peer that takes a message with its descriptor, answers and closes at once was not gone:
    its answer is read."""
    with raw_pair() as (raw, end), contextlib.closing(raw), open(os.devnull) as file:
        send_fds = socket.send_fds

        def send_to_a_quick_peer(*args: object) -> int:
            sent = send_fds(*args)
            raw.recv(100)
            raw.sendall(encode(b"no"))
            raw.close()
            return sent

        monkeypatch.setattr(socket, "send_fds", send_to_a_quick_peer)
        end.send(b"take this", (file.fileno(),))
        assert end.receive(5) == b"no"


def test_has_ended_sees_the_end_past_what_was_said() -> None:
    """`has_ended` is False for a live peer and True after its end, also behind messages that
    nobody will read."""
    with pair() as (a, b):
        assert not b.has_ended()
        a.send(b"unread")
        assert not b.has_ended()
        a.send(b"last words")
        a.close()
        assert b.has_ended()
        assert b.has_ended()


def test_half_close_ends_one_direction_only() -> None:
    """After half_close the peer sees the end, and can still answer."""
    with pair() as (a, b):
        a.send(b"question")
        a.half_close()
        assert b.receive(5) == b"question"
        assert b.receive(5) is None
        assert not a.has_ended()
        b.send(b"answer")
        b.close()
        assert a.receive(5) == b"answer"
        assert a.receive(5) is None
        a.half_close()  # a peer that is gone does not matter


def test_stop_receiving_wakes_who_waits() -> None:
    """A thread that waits for a message returns None when another thread stops its end from
    receiving."""
    with pair() as (_, b):
        received: list[bytes | None] = []
        waiting = threading.Thread(target=lambda: received.append(b.receive()))
        waiting.start()
        b.stop_receiving()
        b.stop_receiving()
        waiting.join()
        assert received == [None]


def test_stop_receiving_lets_the_answer_out() -> None:
    """An end that has stopped receiving has not ended for its peer, which still gets an answer."""
    with pair() as (a, b):
        a.send(b"question")
        assert b.receive(5) == b"question"
        b.stop_receiving()
        assert not a.has_ended()
        with pytest.raises(OSError):
            a.send(b"another question")
        b.send(b"answer")
        assert a.receive(5) == b"answer"
        b.close()
        assert a.has_ended()


def test_close_is_idempotent() -> None:
    """Closing twice, and shutting down a closed socket, have no effect."""
    with pair() as (a, _):
        a.close()
        a.close()
        a.stop_receiving()
        a.half_close()


def test_peer_s_user_is_known() -> None:
    """The kernel reports the peer's user id."""
    with pair() as (a, b):
        assert a.peer_uid() == b.peer_uid() == os.geteuid()


# Descriptors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 4])
def test_descriptors_come_with_their_message(
    either_pair: tuple[FramedSocket, FramedSocket], count: int
) -> None:
    """Descriptors arrive in order with the message, close on exec, and belong to whoever takes
    them."""
    a, b = either_pair
    sent = some_descriptors(count)
    a.send(b"here", tuple(sent))
    assert b.receive(5) == b"here"
    taken = b.take_descriptors()
    assert [os.fstat(fd).st_ino for fd in taken] == [os.fstat(fd).st_ino for fd in sent]
    assert not any(os.get_inheritable(fd) for fd in taken)
    assert b.take_descriptors() == []
    close_all(sent + taken)


def test_descriptors_are_dropped_where_none_are_taken() -> None:
    """An end that takes no descriptors gets the message alone, and nothing is leaked."""
    before = open_files()
    sender, receiver = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    sent = some_descriptors(2)
    with contextlib.closing(FramedSocket(receiver)) as end, sender:
        socket.send_fds(sender, [encode(b"alone")], sent)
        close_all(sent)
        assert end.receive(5) == b"alone"
        assert end.take_descriptors() == []
        assert open_files() == before + 2
    assert open_files() == before


def test_message_without_descriptors_brings_none() -> None:
    """Only a message sent with a descriptor yields one."""
    with pair() as (a, b):
        a.send(b"none")
        assert b.receive(5) == b"none"
        assert b.take_descriptors() == []


def test_descriptors_come_with_a_large_message_too() -> None:
    """A message that is sent in several parts carries its descriptor once."""
    payload = os.urandom(MAX_FRAME)
    with pair() as (a, b):
        [sent] = some_descriptors(1)
        sender = threading.Thread(target=a.send, args=(payload, (sent,)))
        sender.start()
        assert b.receive(30) == payload
        sender.join()
        [taken] = b.take_descriptors()
        close_all([sent, taken])


def test_unclaimed_descriptors_are_closed_with_the_connection() -> None:
    """Descriptors that nobody took are closed by close()."""
    before = open_files()
    with pair() as (a, b):
        sent = some_descriptors(3)
        a.send(b"take them", tuple(sent))
        assert b.receive(5) == b"take them"
        close_all(sent)
    assert open_files() == before


def test_descriptors_of_unread_messages_are_not_leaked() -> None:
    """Descriptors still in the socket, and those of half a frame, go when the connection goes."""
    before = open_files()
    with raw_pair() as (raw, end):
        sent = some_descriptors(2)
        socket.send_fds(raw, [encode(b"half a frame")[:5]], sent[:1])
        with pytest.raises(TimeoutError):
            end.receive(0.02)
        socket.send_fds(raw, [b"more"], sent[1:])
        close_all(sent)
    assert open_files() == before


def test_surplus_descriptors_are_dropped_by_the_kernel() -> None:
    """Of very many descriptors with one message only a few arrive, and none is leaked."""
    before = open_files()
    with raw_pair() as (raw, end):
        sent = some_descriptors(20)
        socket.send_fds(raw, [encode(b"too many")], sent)
        close_all(sent)
        assert end.receive(5) == b"too many"
        taken = end.take_descriptors()
        assert len(taken) < 20
        close_all(taken)
        raw.send(encode(b"still in step"))
        assert end.receive(5) == b"still in step"
    assert open_files() == before
