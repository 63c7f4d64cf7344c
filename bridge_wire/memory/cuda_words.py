"""Words: two counters in memory of a GPU that two processes share. Their streams wait for each
other's.

A stream writes its side's word behind its work, and waits until the other's is large enough. Unlike
an interprocess event, a word whose writer has died can be written by the survivor, two containers
need no common /dev/shm, and CUDA has no rules for it but those of memory.
"""

import ctypes
import time

from bridge_wire.memory.cuda import Device

# How the streams of two processes wait for each other: as here, by interprocess events, or by their
# hosts.
WORDS, EVENTS, HOST = WAYS = ("words", "events", "host")

NBYTES = 256
_WORKERS = 128  # the offset of the worker's word: each has a cache line of its own
_POLL_S = 0.0005
FIRST = 1  # what both write to show that words work; calls have the numbers behind it
PROBE_S = (
    30.0  # for the other side's first write to be seen: the GPU may be busy with something else
)


class Words:
    """One side's use of the words of a lane: read and released on a stream of its own, behind no
    other work."""

    def __init__(self, device: Device, pointer: int, stream: int, *, is_clients: bool) -> None:
        """Use the words at a pointer, and an urgent stream, which is this object's from now on;
        `close` must follow."""
        self._device, self.stream = device, stream
        self._mine, self._theirs = pointer, pointer + _WORKERS
        if not is_clients:
            self._mine, self._theirs = self._theirs, self._mine

    def clear(self) -> None:
        """Set both to zero. Nobody uses them."""
        self._device.fill(min(self._mine, self._theirs), 0, NBYTES, self.stream)
        self._device.synchronize(self.stream)

    def write(self, value: int, stream: int) -> None:
        """Write this side's word when all that is on the stream now is done."""
        self._device.write_word(self._mine, value, stream)

    def wait(self, value: int, stream: int) -> None:
        """Let what comes on the stream wait until the other side's word is at least `value`."""
        self._device.wait_for_word(self._theirs, value, stream)

    def wait_for_own(self, value: int, stream: int) -> None:
        """Let what comes on the stream wait until this side's word is at least `value`."""
        self._device.wait_for_word(self._mine, value, stream)

    def mine(self) -> int:
        """Return what this side's word is now."""
        return self._read(self._mine)

    def theirs(self) -> int:
        """Return what the other side's word is now."""
        return self._read(self._theirs)

    def release(self, value: int) -> None:
        """Write the other side's word, since that side is gone.

        By a copy, which no stream of kernels can delay.
        """
        word = ctypes.c_uint64(value)
        self._copy(self._theirs, ctypes.addressof(word))

    def pass_within(self, value: int, seconds: float) -> bool:
        """Whether a stream here goes on, within some time, that waits for the other side's word
        to be `value`."""
        self.wait(value, self.stream)
        deadline = time.monotonic() + seconds
        while self._device.is_busy(self.stream):
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def comes_within(self, value: int, seconds: float) -> bool:
        """Whether the other side's word is at least `value` within some time."""
        deadline = time.monotonic() + seconds
        while self.theirs() < value:
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def close(self) -> None:
        """Let go of the stream; the memory is the client's."""
        self._device.destroy_stream(self.stream)

    def _read(self, pointer: int) -> int:
        value = ctypes.c_uint64()
        self._copy(ctypes.addressof(value), pointer)
        return value.value

    def _copy(self, target: int, source: int) -> None:
        self._device.copy(target, source, 8, self.stream)
        self._device.synchronize(self.stream)
