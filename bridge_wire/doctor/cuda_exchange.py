"""Live test of GPU memory sharing with a child process, in place of a client and a worker.

`python -m bridge_wire.doctor.cuda_exchange FD UUID` runs the child; FD is its end of the socket.
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

# A handle of a smaller one would expose other allocations on its page.
_ALLOCATION = 2 << 20
_WORDS_AT = 4096  # offset of the words in the allocation, in bytes
_WAY_BYTES = 8
_SEEN_S, _POLL_S = 5.0, 0.001
_DONE, _FAILED = b"+", b"-"  # first byte of the child's answer


def with_child(uuid: bytes, way: str) -> None:
    """Share GPU memory with a child process; each side must read the other side's bytes.

    Each side waits for the other side's work by words or events, or (`HOST`) completes its own work
    before the handover.

    Raises:
      CudaError: the device is unusable, the child cannot open the memory, or the child sees other
        memory.
      WorldError: the child exited.
    """
    with contextlib.ExitStack() as held:
        side = _Side(device_of(uuid), held)
        memory = side.device.allocate(_ALLOCATION)
        held.callback(side.device.free, memory)
        side.share(memory, way, is_child=False)
        handle = side.device.handle_of(memory)
        # The child exits before the memory is freed.
        lane = held.enter_context(lane_to_child(__spec__.name, uuid.hex()))
        written = os.urandom(NBYTES)
        side.write(memory, written)
        lane.send(handle + way.encode().ljust(_WAY_BYTES) + side.hand_over())
        read, event = _answer(lane)
        side.take_over(event)
        # Read in any case: no stream may still wait for the child's event when the child exits.
        returned = side.read(memory + NBYTES)
        if (read, returned) != (written, written[::-1]):
            raise CudaError(
                "the child process and this process see different bytes in GPU memory"
            )


def _answer(lane: FramedSocket) -> tuple[bytes, bytes]:
    """Return the bytes that the child has read, and its event's handle or b""."""
    answer = lane.receive(CHILD_S)
    if answer is None:
        raise WorldError("the child process exited and did not receive the memory")
    if answer.startswith(_FAILED):
        raise CudaError(answer[1:].decode())
    return answer[1 : 1 + NBYTES], answer[1 + NBYTES :]


class _Side:
    """GPU work of one of the two processes, with the handover to the other.

    `held` releases the side's resources.
    """

    def __init__(self, device: Device, held: contextlib.ExitStack) -> None:
        self.device = device
        self._held = held
        self._stream = device.new_stream()
        held.callback(device.destroy_stream, self._stream)

    def share(self, memory: int, way: str, *, is_child: bool) -> None:
        """Share memory, and use `way` to wait for the other side."""
        self._way = way
        if way == WORDS:
            if not self.device.has_words:
                raise CudaError(
                    "this driver's streams can neither write nor await 64-bit words"
                )
            stream = self.device.new_urgent_stream()
            self._words = Words(
                self.device, memory + _WORDS_AT, stream, is_clients=not is_child
            )
            self._held.callback(self._words.close)
            if not is_child:
                self._words.clear()

    def write(self, pointer: int, data: bytes) -> None:
        """Enqueue a copy of `data` to the GPU."""
        self._data = ctypes.create_string_buffer(data, len(data))
        self.device.copy(pointer, ctypes.addressof(self._data), len(data), self._stream)

    def read(self, pointer: int) -> bytes:
        """Return NBYTES from the GPU."""
        data = ctypes.create_string_buffer(NBYTES)
        self.device.copy(ctypes.addressof(data), pointer, NBYTES, self._stream)
        self.device.synchronize(self._stream)
        return data.raw

    def hand_over(self) -> bytes:
        """Let the other side continue.

        Returns the handle of the event for its wait, or b"" for the other ways.
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
        """Wait for the other side's event or word."""
        if self._way == WORDS:
            self._words.wait(FIRST, self._stream)
            deadline = time.monotonic() + _SEEN_S
            while self.device.is_busy(self._stream):
                if time.monotonic() > deadline:
                    self._words.release(FIRST)
                    raise CudaError(
                        "a stream does not see the word written by another process's stream"
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
                # Keeps the sources of its copies alive until the end.
                side = _Side(device_of(uuid), held)
                answer = _DONE + _answered(side, request, held)
            except CudaError as error:
                answer = _FAILED + str(error).encode()
            lane.send(answer)
            lane.receive(CHILD_S)  # stays until the parent has read
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
