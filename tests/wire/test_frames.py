"""Frames are cut alike however the bytes arrive, and a stream of no frames is refused without
being buffered."""

import random
import struct
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge_wire.errors import ProtocolError
from bridge_wire.lane.frames import CHUNK, MAX_FRAME, FrameDecoder, encode
from bridge_wire.pb import bridge_pb2 as pb

MESSAGES = [
    b"",
    b"x",
    b"\x00\x00\x00\x00",
    b"\xff" * 300,
    pb.LaneRequest(attach=pb.Attach(session=b"s" * 32)).SerializeToString(),
    pb.LaneRequest(share=pb.Share(base=4096, nbytes=1 << 24)).SerializeToString(),
    pb.LaneRequest(
        run=pb.Run(program=1, inputs=[4096, 4160], outputs=[8192], residual=7)
    ).SerializeToString(),
    pb.LaneRequest(release=pb.Release(residuals=range(100))).SerializeToString(),
    pb.LaneReply(
        error=pb.Error(kind="ProtocolError", message="é" * 500)
    ).SerializeToString(),
]


def cut(pieces: Iterable[bytes]) -> list[bytes]:
    """Feed the pieces of a stream one by one; return the messages, taken as soon as they are
    whole."""
    decoder, messages = FrameDecoder(), []
    for piece in pieces:
        message = decoder.feed(piece)
        while message is not None:
            messages.append(message)
            message = decoder.next()
    return messages


@pytest.mark.parametrize("message", MESSAGES, ids=range(len(MESSAGES)))
def test_message_comes_whole(message: bytes) -> None:
    """A frame that is fed at once gives its message, and then nothing."""
    messages = cut([encode(message)])
    assert messages == [message]


@pytest.mark.parametrize("message", MESSAGES, ids=range(len(MESSAGES)))
def test_message_comes_byte_by_byte(message: bytes) -> None:
    """A frame that is fed byte by byte gives its message with the last byte and none before."""
    frame = encode(message)
    decoder = FrameDecoder()
    for i in range(len(frame) - 1):
        assert decoder.feed(frame[i : i + 1]) is None
        assert decoder.next() is None
    assert decoder.feed(frame[-1:]) == message
    assert decoder.next() is None


@pytest.mark.parametrize("message", MESSAGES, ids=range(len(MESSAGES)))
def test_trailing_bytes_belong_to_the_next_message(message: bytes) -> None:
    """Bytes after a frame are kept, and complete the next message when its rest comes."""
    second = encode(b"the next one")
    decoder = FrameDecoder()
    assert decoder.feed(encode(message) + second[:6]) == message
    assert decoder.next() is None
    assert decoder.feed(second[6:]) == b"the next one"


def test_frame_is_a_little_endian_length_and_the_payload() -> None:
    """The golden frame: four bytes of length, least significant first, then the payload."""
    assert encode(b"abc") == b"\x03\x00\x00\x00abc"
    assert encode(b"\x07" * 258)[:5] == b"\x02\x01\x00\x00\x07"


def test_largest_message_passes_and_a_longer_one_is_not_sent() -> None:
    """A message of MAX_FRAME bytes, which a chunk with its envelope stays below, passes; one
    byte more is refused."""
    assert len(pb.LaneRequest(chunk=bytes(CHUNK)).SerializeToString()) <= MAX_FRAME
    assert cut([encode(bytes(MAX_FRAME))]) == [bytes(MAX_FRAME)]
    with pytest.raises(ProtocolError, match=str(MAX_FRAME)):
        encode(bytes(MAX_FRAME + 1))


@pytest.mark.parametrize("length", [MAX_FRAME + 1, 2**31, 2**32 - 1])
def test_oversized_frame_is_refused_by_its_length_alone(length: int) -> None:
    """A frame over the limit is a ProtocolError as soon as its length is there, before any of
    its payload."""
    decoder = FrameDecoder()
    assert decoder.feed(struct.pack("<I", length)[:3]) is None
    with pytest.raises(ProtocolError, match=str(length)):
        decoder.feed(struct.pack("<I", length)[3:])
    with pytest.raises(ProtocolError):  # and again: the stream stays unreadable
        decoder.next()


def test_messages_before_an_oversized_frame_are_not_lost() -> None:
    """Whole messages ahead of an illegal frame are handed out first."""
    decoder = FrameDecoder()
    assert decoder.feed(encode(b"good") + struct.pack("<I", MAX_FRAME + 1)) == b"good"
    with pytest.raises(ProtocolError):
        decoder.next()


@settings(deadline=None)
@given(
    st.lists(st.binary(max_size=200), max_size=20), st.randoms(use_true_random=False)
)
def test_messages_are_the_same_however_they_are_cut(
    messages: list[bytes], random: random.Random
) -> None:
    """Any way of cutting a stream of frames into pieces gives the same messages in the same
    order."""
    stream = b"".join(map(encode, messages))
    cuts = sorted(
        random.randrange(len(stream) + 1) for _ in range(random.randrange(10))
    )
    pieces = [
        stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)
    ]
    received = cut(pieces)
    assert received == messages


@settings(deadline=None)
@given(st.lists(st.binary(max_size=100)))
def test_random_bytes_give_messages_or_a_protocol_error(pieces: list[bytes]) -> None:
    """Arbitrary bytes give messages within the limit, or a ProtocolError; nothing is made up,
    nothing else raised."""
    stream = b"".join(pieces)
    try:
        messages = cut(pieces)
    except ProtocolError:
        return
    assert stream.startswith(b"".join(map(encode, messages)))


def test_message_does_not_change_with_later_input() -> None:
    """A message that was handed out is a copy: feeding a reused buffer does not alter it."""
    buffer = bytearray(encode(b"first"))
    decoder = FrameDecoder()
    first = decoder.feed(memoryview(buffer))
    buffer[:] = encode(b"other")
    assert (first, decoder.feed(memoryview(buffer))) == (b"first", b"other")
