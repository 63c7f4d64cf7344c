"""The framing of the local lane, without I/O: a little-endian uint32 length, then that many
bytes."""

import struct

from bridge_wire.errors import ProtocolError

CHUNK = 1 << 20  # the most bytes of inline tensors in one message
SMALL = 1 << 16  # the most bytes of inline tensors that travel in a message of another kind
MAX_FRAME = 2 * CHUNK
_LENGTH = struct.Struct("<I")


def encode(payload: bytes) -> bytes:
    """Return the frame of one message."""
    if len(payload) > MAX_FRAME:
        raise ProtocolError(
            f"a message of {len(payload)} bytes exceeds the frame limit of {MAX_FRAME} bytes"
        )
    return _LENGTH.pack(len(payload)) + payload


class FrameDecoder:
    """Cuts a stream of bytes into messages, however the bytes arrive."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes | memoryview) -> bytes | None:
        """Take the next bytes of the stream, and return the next whole message as `next` does."""
        if not self._pending and len(data) > 4 and _LENGTH.unpack_from(data)[0] == len(data) - 4:
            return bytes(
                data[4:]
            )  # exactly one message, as nearly always: not by way of the buffer
        self._pending += data
        return self.next()

    def next(self) -> bytes | None:
        """Return the next whole message of what was fed, or None until more bytes have come.

        Raises:
          ProtocolError: the stream announces a message over the limit. It cannot be read any
            further.
        """
        pending = self._pending
        if len(pending) < 4:
            return None
        (length,) = _LENGTH.unpack_from(pending)
        if length > MAX_FRAME:
            raise ProtocolError(f"a frame announces {length} bytes; the limit is {MAX_FRAME}")
        end = 4 + length
        if len(pending) < end:
            return None
        message = bytes(memoryview(pending)[4:end])
        del pending[:end]
        return message
