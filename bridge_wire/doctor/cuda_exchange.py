"""A live exchange of GPU memory with a child: what a worker and a client do, without either.

`python -m bridge_wire.doctor.cuda_exchange FD UUID` is the child, at the other end of the socket
FD.
"""

import contextlib
import ctypes
import os
import socket
import sys
import time

from bridge_wire.doctor.exchange import CHILD_S, NBYTES, lane_to_child
from bridge_wire.errors import CudaError, WorldError
from bridge_wire.lane.framed_socket import FramedSocket
from bridge_wire.memory.cuda import HANDLE_BYTES, Device, device_of
from bridge_wire.memory.cuda_words import FIRST, HOST, WORDS, Words

_ALLOCATION = 2 << 20  # smaller ones share a page with others, which a handle would give away
_WORDS_AT = 4096  # bytes into it
_WAY_BYTES = 8
_SEEN_S, _POLL_S = 5.0, 0.001
_DONE, _FAILED = b"+", b"-"  # how the child's answer begins


def with_child(uuid: bytes, way: str) -> None:
    """Share memory of a GPU with a child: what this process writes the child must read, and the
    reverse.

    Each side waits for the other's work by words or events, or else (`HOST`) has done its own
    before it hands over.

    Raises:
      CudaError: the device is not to be used, the child cannot open the memory, or sees other
        memory.
      WorldError: the child ended.
    """
    with contextlib.ExitStack() as held:
        side = _Side(device_of(uuid), held)
        memory = side.device.allocate(_ALLOCATION)
        held.callback(side.device.free, memory)
        side.share(memory, way, is_child=False)
        handle = side.device.handle_of(memory)
        lane = held.enter_context(
            lane_to_child(__spec__.name, uuid.hex())
        )  # it lets go before the memory is freed
        written = os.urandom(NBYTES)
        side.write(memory, written)
        lane.send(handle + way.encode().ljust(_WAY_BYTES) + side.hand_over())
        read, event = _answer(lane)
        side.take_over(event)
        if read != written or side.read(memory + NBYTES) != written[::-1]:
            raise CudaError("a child sees other GPU memory than this process does")


def _answer(lane: FramedSocket) -> tuple[bytes, bytes]:
    """Return what the child has read, and the handle of its event, or b""."""
    answer = lane.receive(CHILD_S)
    if answer is None:
        raise WorldError("a child did not receive the memory: it ended")
    if answer.startswith(_FAILED):
        raise CudaError(answer[1:].decode())
    return answer[1 : 1 + NBYTES], answer[1 + NBYTES :]


class _Side:
    """What one of the two processes does on the GPU, and how it hands over.

    What it holds, it gives back by `held`.
    """

    def __init__(self, device: Device, held: contextlib.ExitStack) -> None:
        self.device = device
        self._held = held
        self._stream = device.new_stream()
        held.callback(device.destroy_stream, self._stream)

    def share(self, memory: int, way: str, *, is_child: bool) -> None:
        """Share memory, and wait for the other side in this way."""
        self._way = way
        if way == WORDS:
            if not self.device.has_words:
                raise CudaError(
                    "this driver has streams neither write nor wait for words of 64 bits"
                )
            stream = self.device.new_urgent_stream()
            self._words = Words(self.device, memory + _WORDS_AT, stream, is_clients=not is_child)
            self._held.callback(self._words.close)
            if not is_child:
                self._words.clear()

    def write(self, pointer: int, data: bytes) -> None:
        """Put `data` on the GPU, some time."""
        self._data = ctypes.create_string_buffer(data, len(data))
        self.device.copy(pointer, ctypes.addressof(self._data), len(data), self._stream)

    def read(self, pointer: int) -> bytes:
        """Return NBYTES from the GPU."""
        data = ctypes.create_string_buffer(NBYTES)
        self.device.copy(ctypes.addressof(data), pointer, NBYTES, self._stream)
        self.device.synchronize(self._stream)
        return data.raw

    def hand_over(self) -> bytes:
        """Let the other side go on.

        Returns the handle of the event that it must wait for, if that is the way.
        """
        if self._way == HOST:
            self.device.synchronize(self._stream)
            return b""
        if self._way == WORDS:
            self._words.write(FIRST, self._stream)
            return b""
        event = self.device.new_event(is_shared=True)
        self._held.callback(self.device.destroy_event, event)
        self.device.record(event, self._stream)
        return self.device.event_handle_of(event)

    def take_over(self, handle: bytes) -> None:
        """Go on after the other side's event, or word."""
        if self._way == WORDS:
            self._words.wait(FIRST, self._stream)
            deadline = time.monotonic() + _SEEN_S
            while self.device.is_busy(self._stream):
                if time.monotonic() > deadline:
                    self._words.release(FIRST)
                    raise CudaError(
                        "a stream does not see the word that another process's has written"
                    )
                time.sleep(_POLL_S)
        if handle:
            event = self.device.open_event(handle)
            self._held.callback(self.device.destroy_event, event)
            self.device.wait(event, self._stream)


def _be_the_child(fd: int, uuid: bytes) -> None:
    lane = FramedSocket(socket.socket(fileno=fd))
    try:
        request = lane.receive(CHILD_S)
        if request is None:
            return
        with contextlib.ExitStack() as held:
            try:
                side = _Side(
                    device_of(uuid), held
                )  # it has what it copies from, so it stays until the end
                answer = _DONE + _answered(side, request, held)
            except CudaError as error:
                answer = _FAILED + str(error).encode()
            lane.send(answer)
            lane.receive(CHILD_S)  # until the parent has looked
    finally:
        lane.close()


def _answered(side: _Side, request: bytes, held: contextlib.ExitStack) -> bytes:
    handle, rest = request[:HANDLE_BYTES], request[HANDLE_BYTES:]
    way, event = rest[:_WAY_BYTES].decode().strip(), rest[_WAY_BYTES:]
    memory = side.device.open(handle, _ALLOCATION)
    held.callback(side.device.close, memory)
    side.share(memory, way, is_child=True)
    side.take_over(event)
    read = side.read(memory)
    side.write(memory + NBYTES, read[::-1])
    return read + side.hand_over()


if __name__ == "__main__":
    _be_the_child(int(sys.argv[1]), bytes.fromhex(sys.argv[2]))
