"""Words: a pair of counters in shared GPU memory that order the streams of two processes.

A stream writes its own side's word after its work, and waits until the other side's word is large
enough. Words have three advantages over interprocess events: the survivor can write a dead peer's
word, two containers need no common /dev/shm, and CUDA applies only its rules for memory.
"""

import ctypes
import time

from bridge_wire.memory.cuda import Device

# Ways for two processes' streams to wait for each other: words, interprocess events, or blocking
# on the CPU.
WORDS, EVENTS, HOST = WAYS = ("words", "events", "host")

NBYTES = 256
_WORKERS = 128  # offset of the worker's word, on a separate cache line
_POLL_S = 0.0005
FIRST = 1  # both sides write 1 to show that words work; calls use the numbers above 1
# Time limit for the other side's first write: the GPU may be busy with other work.
PROBE_S = 30.0


class Words:
    """One side of a lane's words. Reads and releases words on a separate stream without other
    work."""

    def __init__(
        self, device: Device, pointer: int, stream: int, *, is_clients: bool
    ) -> None:
        """Use the words at a pointer, and own the given urgent stream; call `close` later."""
        self._device, self.stream = device, stream
        self._mine, self._theirs = pointer, pointer + _WORKERS
        if not is_clients:
            self._mine, self._theirs = self._theirs, self._mine

    def clear(self) -> None:
        """Set both words to zero, before either side uses them."""
        self._device.fill(min(self._mine, self._theirs), 0, NBYTES, self.stream)
        self._device.synchronize(self.stream)

    def write(self, value: int, stream: int) -> None:
        """Enqueue a write of this side's word after the stream's present work."""
        self._device.write_word(self._mine, value, stream)

    def wait(self, value: int, stream: int) -> None:
        """Make later work on the stream wait until the other side's word is at least `value`."""
        self._device.wait_for_word(self._theirs, value, stream)

    def wait_for_own(self, value: int, stream: int) -> None:
        """Make later work on the stream wait until this side's word is at least `value`."""
        self._device.wait_for_word(self._mine, value, stream)

    def mine(self) -> int:
        """Return the present value of this side's word."""
        return self._read(self._mine)

    def theirs(self) -> int:
        """Return the present value of the other side's word."""
        return self._read(self._theirs)

    def release(self, value: int) -> None:
        """Write the word of the other side, which is gone.

        Uses a copy, since kernels on other streams cannot delay a copy.
        """
        word = ctypes.c_uint64(value)
        self._copy(self._theirs, ctypes.addressof(word))

    def pass_within(self, value: int, seconds: float) -> bool:
        """Whether a stream's wait for `value` in the other side's word ends within `seconds`."""
        self.wait(value, self.stream)
        deadline = time.monotonic() + seconds
        while self._device.is_busy(self.stream):
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def comes_within(self, value: int, seconds: float) -> bool:
        """Whether the other side's word reaches `value` within `seconds`."""
        deadline = time.monotonic() + seconds
        while self.theirs() < value:
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def close(self) -> None:
        """Destroy the stream; the client owns the memory."""
        self._device.destroy_stream(self.stream)

    def _read(self, pointer: int) -> int:
        value = ctypes.c_uint64()
        self._copy(ctypes.addressof(value), pointer)
        return value.value

    def _copy(self, target: int, source: int) -> None:
        self._device.copy(target, source, 8, self.stream)
        self._device.synchronize(self.stream)
