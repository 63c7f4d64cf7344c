"""Inline tensors, without I/O: bytes inside a message of another kind, or chunks after it."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from bridge_wire.errors import ProtocolError
from bridge_wire.lane.frames import CHUNK, SMALL

Buffer = bytes | memoryview


class Writable(Protocol):
    """Writable memory of known size."""

    @property
    def nbytes(self) -> int: ...

    @property
    def buffer(self) -> memoryview: ...


def are_small(nbytes: int) -> bool:
    """Whether tensors of `nbytes` bytes in total fit inside a message of another kind."""
    return nbytes <= SMALL


def chunks_of(buffers: Sequence[Buffer]) -> Iterator[bytes]:
    """Split tensors into the chunks that follow their message."""
    for buffer in buffers:
        for start in range(0, len(buffer), CHUNK):
            yield bytes(buffer[start : start + CHUNK])


def fill(blocks: Sequence[Writable], data: bytes, chunks: Iterator[bytes]) -> None:
    """Fill blocks from a message's `data`, or, without data, from the following chunks.

    Raises:
      ProtocolError: the peer sent more or fewer bytes than the blocks have.
    """
    expected = sum(block.nbytes for block in blocks)
    if data and len(data) != expected:
        raise ProtocolError(
            f"a message carries {len(data)} bytes for tensors of {expected} bytes"
        )
    start = 0
    for block in blocks:
        if data:
            block.buffer[:] = data[start : start + block.nbytes]
            start += block.nbytes
            continue
        filled = 0
        for chunk in taken(block.nbytes, chunks):
            block.buffer[filled : filled + len(chunk)] = chunk
            filled += len(chunk)


def taken(nbytes: int, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the chunks of one tensor.

    Raises:
      ProtocolError: a chunk is empty, too long, or missing.
    """
    missing = nbytes
    while missing:
        chunk = next(chunks, None)
        if chunk is None:
            raise ProtocolError(
                f"the peer sent no more chunks; {missing} bytes of a tensor are missing"
            )
        if not 0 < len(chunk) <= min(CHUNK, missing):
            raise ProtocolError(
                f"a chunk has {len(chunk)} bytes; {missing} bytes were missing"
            )
        missing -= len(chunk)
        yield chunk
