"""`bridge_wire.memory.cuda`, on GPUs that are none."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bridge_wire.errors import CudaError, OutOfMemory
from bridge_wire.memory import cuda
from bridge_wire.memory.cuda import (
    HANDLE_BYTES,
    Device,
    device_of,
    driver,
    gpus,
    label_of,
)
from bridge_wire.memory.cuda_memory import copied_to_host, copy_to_device
from tests.gpu.faking import installed

_ONE = bytes(range(16))
_TWO = bytes(range(16, 32))

# Allocates as many bytes, exports them and an event, and lives until its input ends.
_EXPORTER = """
import sys
from bridge_wire.memory.cuda import device_of, gpus

device = device_of(bytes.fromhex(sys.argv[1]))
memory, event = device.allocate(int(sys.argv[2])), device.new_event(is_shared=True)
print(device.handle_of(memory).hex(), device.event_handle_of(event).hex(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def device(fake_cuda: Any) -> Device:
    return device_of(_ONE)


@pytest.fixture
def two_gpus(tmp_path: Path) -> Iterator[Any]:
    with installed(tmp_path, label_of(_ONE), label_of(_TWO)) as fake:
        yield fake


class _Exporter:
    """Another process's memory and event."""

    def __init__(self, uuid: bytes, nbytes: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _EXPORTER, uuid.hex(), str(nbytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout
        self.memory, self.event = map(
            bytes.fromhex, self._process.stdout.readline().split()
        )

    def __enter__(self) -> "_Exporter":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


def test_a_label_is_what_nvidia_smi_writes() -> None:
    """GPU- and the UUID in groups of 8, 4, 4, 4 and 12 digits."""
    assert label_of(_ONE) == "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"


def test_without_a_driver_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """To list them is no error; to use one is, and says what is missing."""

    def refuse(name: str, *_: object) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    driver.cache_clear()
    assert gpus() == ()
    with pytest.raises(CudaError, match="no NVIDIA driver"):
        device_of(_ONE)


def test_a_driver_that_does_not_start_is_an_error_with_its_number(
    tmp_path: Path,
) -> None:
    """As in a container that was given no device."""
    with installed(tmp_path) as fake:
        os.environ["FAKE_CUDA_GPUS"] = ""
        assert gpus() == ()
        with pytest.raises(CudaError, match=f"cuInit with error {fake._NO_DEVICE}"):
            driver()


def test_the_driver_tells_its_version_and_the_devices(two_gpus: Any) -> None:
    """By number in this process, UUID and name."""
    assert driver().version() == "13.0"
    assert [(gpu.ordinal, gpu.uuid, gpu.label) for gpu in gpus()] == [
        (0, _ONE, two_gpus.ONE),
        (1, _TWO, two_gpus.TWO),
    ]
    assert gpus()[0].name == "Fake GPU 0"


def test_a_device_is_found_by_uuid_under_any_numbering(
    two_gpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA_VISIBLE_DEVICES renumbers the devices, and hides some."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert device_of(_TWO).gpu.ordinal == 0
    device_of.cache_clear()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", two_gpus.TWO)
    assert [gpu.uuid for gpu in gpus()] == [_TWO]
    with pytest.raises(
        CudaError, match=f"cannot see {two_gpus.ONE}; add the GPU to CUDA_VISIBLE"
    ):
        device_of(_ONE)


def test_without_cupy_a_device_says_what_to_install(
    fake_cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Devices are listed all the same."""
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    assert gpus()
    with pytest.raises(CudaError, match=r"install torch-jax-bridge\[cuda\]"):
        device_of(_ONE)


def test_a_device_out_of_order_is_found_out_at_once(
    fake_cuda: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is built on it."""
    monkeypatch.setenv("FAKE_CUDA_FAILS", "memGetInfo:700")
    with pytest.raises(CudaError, match="IllegalAddress"):
        device_of(_ONE)


def test_memory_comes_and_goes(device: Device) -> None:
    """And is counted."""
    before = device.free_bytes()
    pointer = device.allocate(2 << 20)
    assert pointer % 256 == 0 and before - device.free_bytes() == 2 << 20
    device.free(pointer)
    assert device.free_bytes() == before


def test_no_room_is_out_of_memory_and_the_next_request_is_served(
    tmp_path: Path,
) -> None:
    """The error names the device."""
    with installed(tmp_path, nbytes=4 << 20):
        device = device_of(_ONE)
        with pytest.raises(OutOfMemory, match=f"{device.gpu.label} is out of memory"):
            device.allocate(8 << 20)
        device.free(device.allocate(4 << 20))


@pytest.mark.parametrize("nbytes", [0, 63, 65])
def test_a_handle_of_another_length_is_refused_unread(
    device: Device, nbytes: int
) -> None:
    """CuPy would read 64 bytes, whatever it is given."""
    with pytest.raises(
        CudaError, match=f"a memory handle has {nbytes} bytes; expected 64"
    ):
        device.open(bytes(nbytes), 256)
    with pytest.raises(
        CudaError, match=f"an event handle has {nbytes} bytes; expected 64"
    ):
        device.open_event(bytes(nbytes))


def test_a_random_handle_is_refused(device: Device) -> None:
    """With an error that carries nothing of it."""
    handle = os.urandom(HANDLE_BYTES)
    for opens in (lambda: device.open(handle, 256), lambda: device.open_event(handle)):
        with pytest.raises(
            CudaError, match=r"refused: .* with error (1|400), cudaError"
        ) as raised:
            opens()
        assert handle.hex()[:8] not in str(raised.value)


def test_ones_own_handles_are_refused(device: Device) -> None:
    """As CUDA does."""
    pointer, event = device.allocate(4096), device.new_event(is_shared=True)
    with pytest.raises(CudaError, match="refused"):
        device.open(device.handle_of(pointer), 4096)
    with pytest.raises(CudaError, match="refused"):
        device.open_event(device.event_handle_of(event))


def test_another_processes_memory_and_event_are_opened_and_let_go(
    device: Device, fake_cuda: Any
) -> None:
    """All of the memory, or part of it."""
    with _Exporter(_ONE, 4 << 20) as other:
        for nbytes in (256, 4 << 20):
            pointer = device.open(other.memory, nbytes)
            ctypes.memset(pointer, 1, nbytes)
            device.close(pointer)
        event = device.open_event(other.event)
        device.wait(event, None)
        device.destroy_event(event)
        assert not fake_cuda.held()["openmem"] and not fake_cuda.held()["openevent"]


def test_smaller_memory_than_announced_is_refused_and_let_go(
    device: Device, fake_cuda: Any
) -> None:
    """Nothing could check each access."""
    with _Exporter(_ONE, 2 << 20) as other:
        with pytest.raises(
            CudaError, match="has 2097152 bytes, but the peer announced 2097153"
        ):
            device.open(other.memory, (2 << 20) + 1)
        assert not fake_cuda.held()["openmem"]


def test_a_handle_of_freed_memory_is_refused(device: Device) -> None:
    """Its process has ended."""
    with _Exporter(_ONE, 4096) as other:
        pass
    os.unlink(
        next(
            path
            for path in Path(os.environ["FAKE_CUDA_DIR"]).iterdir()
            if path.name.startswith("mem-")
        )
    )
    with pytest.raises(CudaError, match="refused"):
        device.open(other.memory, 4096)


def test_memory_of_another_gpu_is_refused(two_gpus: Any) -> None:
    """A handle is opened on the device that it is of, or not at all."""
    with _Exporter(_TWO, 4096) as other:
        with pytest.raises(CudaError, match="peer access"):
            device_of(_ONE).open(other.memory, 4096)
        device = device_of(_TWO)
        device.close(device.open(other.memory, 4096))


def test_each_device_does_what_it_is_asked_on_itself(two_gpus: Any) -> None:
    """And the thread's current device is what it was."""
    two_gpus.setDevice(0)
    one, two = device_of(_ONE), device_of(_TWO)
    one_free, two_free = one.free_bytes(), two.free_bytes()
    pointer = two.allocate(4096)
    assert one.free_bytes() == one_free and two_free - two.free_bytes() == 4096
    with pytest.raises(CudaError):
        two.free(pointer + 256)
    assert two_gpus.getDevice() == 0
    two.free(pointer)


def test_streams_take_turns_by_events(device: Device, fake_cuda: Any) -> None:
    """A copy on a stream that waits for an event comes after what was on the recorded one;
    asking never blocks."""
    source, target = device.allocate(256), device.allocate(256)
    ctypes.memset(source, 7, 256)
    writing, reading, event = (
        device.new_stream(),
        device.new_stream(),
        device.new_event(),
    )
    held = fake_cuda.hold(writing)
    device.copy(target, source, 256, writing)
    device.record(event, writing)
    device.wait(event, reading)
    seen = (ctypes.c_ubyte * 256)()
    device.copy(ctypes.addressof(seen), target, 256, reading)
    assert not driver().has_passed(event)
    held.set()
    device.synchronize(reading)
    assert bytes(seen) == b"\x07" * 256 and driver().has_passed(event)
    device.wait(event, None)
    for stream in (writing, reading):
        device.destroy_stream(stream)
    device.destroy_event(event)
    assert set(fake_cuda.held()) == {"bytes", "mem"}


def test_what_another_process_can_delay_lets_other_threads_run(
    fake_cuda: Any, device: Device
) -> None:
    """Handles are opened and closed by the driver through ctypes, which releases the GIL: CuPy
    keeps it, and CUDA may wait meanwhile for the other process's kernel, and that for a callback in
    Python.
    """
    used: list[str] = []

    class Runtime:
        """CuPy's, noting what is called."""

        def __getattr__(self, name: str) -> Any:
            if name.startswith("ipc"):
                used.append(name)
            return getattr(fake_cuda, name)

    noting = Device(device.gpu, Runtime(), is_only=True)
    with _Exporter(_ONE, 2 << 20) as other:
        noting.close(noting.open(other.memory, 2 << 20))
        noting.destroy_event(noting.open_event(other.event))
    assert used == []
    # Ctypes.PyDLL would keep the GIL.
    assert not driver()._library.__class__.__name__.startswith("Py")


def test_streams_take_turns_by_words(device: Device, fake_cuda: Any) -> None:
    """What comes on a stream that waits for a word comes when another stream, or a copy, has
    written it."""
    word, waiting, writing = (
        device.allocate(2 << 20),
        device.new_stream(),
        device.new_urgent_stream(),
    )
    assert device.has_words
    copy_to_device(device, word, bytes(8))
    device.wait_for_word(word, 3, waiting)
    device.fill(word + 8, 7, 8, waiting)
    device.write_word(word, 2, writing)
    device.synchronize(writing)
    assert device.is_busy(waiting) and copied_to_host(
        device, word, 16
    ) == b"\2" + bytes(15)
    device.write_word(word, 4, writing)
    device.synchronize(waiting)
    assert copied_to_host(device, word, 16) == b"\4" + bytes(7) + b"\7" * 8
    for stream in (waiting, writing):
        device.destroy_stream(stream)
    device.free(word)


def test_a_driver_without_words_says_so(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its attribute, or since it is too old to have the functions."""
    monkeypatch.setenv("FAKE_CUDA_WORDS", "0")
    assert not device.has_words
    monkeypatch.delattr("fake_cuda.Library.cuStreamWriteValue64_v2")
    with pytest.raises(CudaError, match=r"for CUDA 11\.7 or newer"):
        device.write_word(device.allocate(4096), 1, 0)


def test_what_cuda_refuses_says_which_device_and_why(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By CUDA's own name of the error."""
    monkeypatch.setenv("FAKE_CUDA_FAILS", "ipcGetEventHandle:801")
    with pytest.raises(
        CudaError, match=f"{device.gpu.label} refused: cudaErrorNotSupported"
    ):
        device.event_handle_of(device.new_event(is_shared=True))


def test_the_fake_is_gone_after_its_test(tmp_path: Path) -> None:
    """It leaves neither modules nor a device behind."""
    before = Device.dlpack_type
    with installed(tmp_path):
        assert device_of(_ONE).dlpack_device == (1, 0)
    assert Device.dlpack_type == before and not isinstance(
        ctypes.CDLL(None), cuda.Driver
    )
    assert "fake_cuda" not in sys.modules
