"""Frames of the local lane, without I/O: a little-endian uint32 length, then the payload."""

import struct

from bridge_wire.errors import ProtocolError

CHUNK = 1 << 20  # maximum bytes of inline tensors in one chunk message
SMALL = 1 << 16  # maximum bytes of inline tensors inside a message of another kind
MAX_FRAME = 2 * CHUNK
_LENGTH = struct.Struct("<I")


def encode(payload: bytes) -> bytes:
    """Return the frame of one message."""
    if len(payload) > MAX_FRAME:
        raise ProtocolError(
            f"a message has {len(payload)} bytes; a frame holds at most {MAX_FRAME} bytes"
        )
    return _LENGTH.pack(len(payload)) + payload


class FrameDecoder:
    """Splits a byte stream into messages; the bytes may arrive in any portions."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes | memoryview) -> bytes | None:
        """Append bytes of the stream; return the next whole message, like `next`."""
        if (
            not self._pending
            and len(data) > 4
            and _LENGTH.unpack_from(data)[0] == len(data) - 4
        ):
            # Fast path without the buffer: nearly always the data is exactly one message.
            return bytes(data[4:])
        self._pending += data
        return self.next()

    def next(self) -> bytes | None:
        """Return the next whole message, or None if its bytes are incomplete.

        Raises:
          ProtocolError: the stream announces a message over the limit. The stream is unreadable
            from there on.
        """
        pending = self._pending
        if len(pending) < 4:
            return None
        (length,) = _LENGTH.unpack_from(pending)
        if length > MAX_FRAME:
            raise ProtocolError(
                f"a frame announces {length} bytes; the limit is {MAX_FRAME}"
            )
        end = 4 + length
        if len(pending) < end:
            return None
        message = bytes(memoryview(pending)[4:end])
        del pending[:end]
        return message
