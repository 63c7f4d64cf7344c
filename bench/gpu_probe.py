"""What CUDA, its driver and JAX do on this machine, where what is published contradicts itself.

`python -m bench.gpu_probe` prints the rows of the table in docs/gpu.md, each answered by a process of its own, since
some questions end the process. It needs a GPU, CuPy and JAX, and changes no setting of the GPU.
"""

import argparse
import contextlib
import ctypes
import gc
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import ROOT
from bridge_wire import cuda_exchange
from bridge_wire.cuda import HANDLE_BYTES, Device, device_of, driver, gpus
from bridge_wire.dlpack import DeviceExporter, keep_owners_by
from bridge_wire.dtypes import BY_NAME
from bridge_wire.errors import CudaError, WorldError
from bridge_wire.gpu_checks import has_mps
from bridge_wire.host import installed
from bridge_wire.specs import Spec

MIB, GIB = 1 << 20, 1 << 30
_MODULE = "bench.gpu_probe"
_ANSWER_S = 180.0
_COUNT = 1 << 20  # elements of the arrays that JAX is given
_FLOATS = Spec(BY_NAME["float32"], (_COUNT,))
_REPEATS = 20
_SIDE, _STEPS = 4096, 200  # products of such matrices keep a GPU busy for some tenths of a second
_COPIES = 2000  # and so do copies of 256 MiB
_REST_S = 15.0
_PACKAGES = ("jax", "jaxlib", "torch", "cupy-cuda12x", "cupy-cuda13x")


class Question(NamedTuple):
    """A question of the table, and who answers it."""

    text: str
    answer: Callable[[], str]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table. Returns the exit status: 1 if there is no GPU to ask."""
    parser = argparse.ArgumentParser("bench.gpu_probe", description="Print the rows of the table in docs/gpu.md.")
    parser.add_argument("name", nargs="?", choices=QUESTIONS, help="answer this question only, in this process")
    options = parser.parse_args(argv)
    if not gpus():
        print("there is no GPU here that CUDA's driver would show: nothing was asked")
        return 1
    if options.name:
        print(QUESTIONS[options.name].answer())
        return 0
    print(described())
    print("\n| question | answer |\n|---|---|")
    for name, question in QUESTIONS.items():
        print(f"| {question.text} | {_asked(name)} |", flush=True)
    return 0


def described() -> str:
    """Return the machine and the versions in one line."""
    models = ", ".join(gpu.name for gpu in gpus())
    packages = ", ".join(f"{name} {version}" for name in _PACKAGES if (version := installed(name)))
    system = f"Linux {platform.release()}, Python {platform.python_version()}"
    return f"{models}; CUDA {driver().version()}; {system}; {packages}"


def _asked(name: str) -> str:
    command = [sys.executable, "-m", _MODULE, name]
    variables = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | os.environ
    try:
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=_ANSWER_S)
    except subprocess.TimeoutExpired:
        return f"no answer in {_ANSWER_S:g} s"
    if done.returncode == 0:
        return done.stdout.strip().splitlines()[-1].replace("|", "/")
    return f"{_ended(done.returncode)}: {_last_line(done.stderr)}"


def _ended(status: int) -> str:
    return f"the process ended with {status if status > 0 else signal.Signals(-status).name}"


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no word"])[-1][:200].replace("|", "/")


def _device() -> Device:
    return device_of(gpus()[0].uuid)


# Handles ----------------------------------------------------------------------------------------------------------


def _exchange() -> str:
    return _crossing()


def _crossing(way: str = "events") -> str:
    try:
        cuda_exchange.with_child(gpus()[0].uuid, way)
    except WorldError as error:
        return f"no: {error}"
    return f"yes, in order by {way}"


def _bad_handles() -> str:
    device = _device()
    own = device.allocate(2 * MIB)
    handles = {
        "0 bytes": b"",
        "63 bytes": bytes(63),
        "65 bytes": bytes(65),
        "zeros": bytes(HANDLE_BYTES),
        "random": os.urandom(HANDLE_BYTES),
        "its own": device.handle_of(own),
    }
    if len(gpus()) > 1:
        other = device_of(gpus()[1].uuid)
        handles["another GPU's"] = other.handle_of(other.allocate(2 * MIB))
    found = [f"{name}: {_opening(device, handle)}" for name, handle in handles.items()]
    device.free(own)
    device.free(device.allocate(2 * MIB))
    return "; ".join([*found, "the process goes on"])


def _opening(device: Device, handle: bytes) -> str:
    try:
        device.close(device.open(handle, 1))
    except CudaError as error:
        return str(error).rpartition("refused: ")[2]
    return "OPENED"


def _namespaces() -> str:
    """The child of the exchange in namespaces of its own, which takes the right to make some."""
    found = []
    for name, options in (("PID", "--pid --fork --mount-proc"), ("IPC", "--ipc"), ("both", "--pid --ipc --fork")):
        with tempfile.TemporaryDirectory() as folder, _python(Path(folder), f"unshare {options}") as works:
            found.append(f"own {name}: {_crossing() if works else 'not allowed here'}")
    return "; ".join(found)


@contextlib.contextmanager
def _python(folder: Path, prefix: str) -> Any:
    """Let children run behind a command; whether that command works."""
    real = sys.executable
    wrapper = folder / "python"
    wrapper.write_text(f'#!/bin/sh\nexec {prefix} {real} "$@"\n')
    wrapper.chmod(0o755)
    works = subprocess.run([wrapper, "-c", ""], capture_output=True).returncode == 0
    sys.executable = str(wrapper)
    try:
        yield works
    finally:
        sys.executable = real


def _mixed_mps() -> str:
    if not has_mps():
        return "not asked: there is no MPS daemon here"
    with tempfile.TemporaryDirectory() as folder:
        without = f"env CUDA_MPS_PIPE_DIRECTORY={folder}/none"
        with _python(Path(folder), without):
            return f"handles to a process without MPS: {_crossing()}"


# JAX --------------------------------------------------------------------------------------------------------------


def _export_from_jax() -> str:
    found = []
    for preallocate in ("true", "false"):
        variables = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": preallocate, "XLA_CLIENT_MEM_FRACTION": "0.2"}
        done = subprocess.run(
            [sys.executable, "-c", f"from {_MODULE} import export; print(export())"],
            cwd=ROOT,
            env=variables,
            capture_output=True,
            text=True,
        )
        said = done.stdout.strip() if done.returncode == 0 else f"{_ended(done.returncode)}: {_last_line(done.stderr)}"
        found.append(f"preallocate={preallocate}: {said}")
    return "; ".join(found)


def export() -> str:
    """Try to export an array of JAX's own; return what became of it, and of JAX."""
    import jax.numpy as jnp

    array = jnp.ones(_COUNT)
    array.block_until_ready()
    try:
        _device().handle_of(array.unsafe_buffer_pointer())
        found = "exported"
    except CudaError as error:
        found = str(error).rpartition("refused: ")[2]
    try:
        return f"{found}, afterwards JAX computes" if (array * 3).sum() == 3 * _COUNT else f"{found}, JAX is WRONG"
    except Exception as error:
        return f"{found}, afterwards JAX fails: {_last_line(str(error))}"


class _Owner:
    """Keeps nothing; that it has gone tells that the memory was let go."""


def _imported(device: Device, pointer: int, wait: Callable[[int | None], None] = lambda stream: None) -> Any:
    """Return memory of the GPU as an array of JAX, and a weak reference to what dies when JAX lets go of it."""
    import jax
    import numpy as np

    keep_owners_by(lambda kept: np.frombuffer(kept, np.uint8).__dlpack__())
    owner = _Owner()
    array = jax.dlpack.from_dlpack(DeviceExporter(pointer, _FLOATS, owner, device.dlpack_device, wait))
    return array, weakref.ref(owner)


def _filled(device: Device, value: float) -> int:
    pointer = device.allocate(_FLOATS.nbytes)
    source = (ctypes.c_float * _COUNT)(*[value] * _COUNT)
    stream = device.new_stream()
    device.copy(pointer, ctypes.addressof(source), _FLOATS.nbytes, stream)
    device.synchronize(stream)
    return pointer


def _donation() -> str:
    import jax

    device = _device()
    array, _ = _imported(device, _filled(device, 1.0))
    result = jax.jit(lambda x: x + 1, donate_argnums=0)(array)
    result.block_until_ready()
    is_reused = result.unsafe_buffer_pointer() == array.unsafe_buffer_pointer() if not array.is_deleted() else None
    return f"no: the result is {'right' if (result == 2).all() else 'WRONG'}, the donated array is " + (
        "deleted" if is_reused is None else "written over" if is_reused else "copied"
    )


def _deleter() -> str:
    import jax
    import jax.numpy as jnp

    device = _device()
    weights = jnp.full((_SIDE, _SIDE), 1e-3)

    @jax.jit
    def late(x: Any) -> Any:
        work = jax.lax.fori_loop(0, _STEPS, lambda _, v: jnp.tanh(v @ weights), weights)
        return x + 1 + 0 * work[0, 0]

    late(jnp.zeros(_COUNT)).block_until_ready()
    array, owner = _imported(device, _filled(device, 1.0))
    result = late(array)
    del array
    gc.collect()
    has_run, is_ready = owner() is None, result.is_ready()
    result.block_until_ready()
    if is_ready:
        return "not told: the result was ready too soon"
    return "yes: it ran while the GPU had still to read it" if has_run else "no: it had not run while the GPU computed"


def _events() -> str:
    device, streams = _device(), []
    source, target = _filled(device, 2.0), _filled(device, 1.0)
    writing, event = device.new_stream(), device.new_event()
    _busy(device, writing)
    device.copy(target, source, _FLOATS.nbytes, writing)
    device.record(event, writing)
    is_late = not driver().has_passed(event)

    def wait(stream: int | None) -> None:
        streams.append(stream)
        device.wait(event, stream)

    array, _ = _imported(device, target, wait)
    is_on_host = driver().has_passed(event)
    is_right = bool((array == 2).all())
    named = "no stream" if streams == [None] else "a stream of its own"
    waited = "the host waited" if is_on_host else "the host did not wait"
    return f"{'yes' if is_right and is_late else 'NO'}: JAX names {named}, {waited}, the values are " + (
        "right" if is_right else "WRONG"
    )


def _busy(device: Device, stream: int) -> None:
    """Keep a stream busy for some tenths of a second."""
    source, target = device.allocate(256 * MIB), device.allocate(256 * MIB)
    for _ in range(_COPIES):
        device.copy(target, source, 256 * MIB, stream)


# Events of processes that end ---------------------------------------------------------------------------------------


def _dead_events() -> str:
    """What becomes of a stream that waits for an event to which its process, or its owner, will never come."""
    found = [f"{how}: {_waiting_for(how)}" for how in ("killed", "destroyed")]
    print("; ".join(found), flush=True)
    os._exit(0)  # with streams that may never be done, CUDA need not come to an end


def _waiting_for(how: str) -> str:
    device = _device()
    stream, other = device.new_stream(), device.new_stream()
    program = f"from {_MODULE} import record_late; record_late({how == 'destroyed'})"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        event = device.open_event(bytes.fromhex(process.stdout.readline()))
        print("record", file=process.stdin, flush=True)
        assert process.stdout.readline() == "recorded\n"
        device.wait(event, stream)
        is_late = device.is_busy(stream)
        if how == "killed":
            process.kill()
        else:
            print("destroy", file=process.stdin, flush=True)
            assert process.stdout.readline() == "destroyed\n"
        if not is_late:
            return "not told: the event had passed too soon"
        if _comes_to_rest(device, stream):
            return "the stream goes on"
        device.record(event, other)
        helps = "goes on" if _comes_to_rest(device, stream) else "stands still"
        process.kill()
    return f"the stream stands still; when this process records the event, it {helps}"


def _comes_to_rest(device: Device, stream: int) -> bool:
    deadline = time.monotonic() + _REST_S
    while device.is_busy(stream) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not device.is_busy(stream)


def record_late(is_destroyed: bool) -> None:
    """Record an event behind some work, having told its handle; then destroy it, or wait to be killed."""
    device = _device()
    stream, event = device.new_stream(), device.new_event(is_shared=True)
    print(device.event_handle_of(event).hex(), flush=True)
    sys.stdin.readline()
    _busy(device, stream)
    device.record(event, stream)
    print("recorded", flush=True)
    sys.stdin.readline()
    if is_destroyed:
        device.destroy_event(event)
        print("destroyed", flush=True)
        sys.stdin.readline()


# What things cost, and what is left behind ------------------------------------------------------------------------


def _costs() -> str:
    return "; ".join([*map(_cost_of_a_copy, (64 * MIB, GIB)), *map(_cost_of_opening, (64 * MIB, GIB))])


def _cost_of_a_copy(nbytes: int) -> str:
    device = _device()
    source, target, stream = device.allocate(nbytes), device.allocate(nbytes), device.new_stream()
    seconds = _median_s(lambda: _copied(device, target, source, nbytes, stream))
    for pointer in (source, target):
        device.free(pointer)
    return f"copy of {nbytes // MIB} MiB {seconds * 1e3:.3f} ms ({nbytes / seconds / 1e9:.0f} GB/s)"


def _cost_of_opening(nbytes: int) -> str:
    device, opened = _device(), []
    with _Holder(nbytes) as other:
        seconds = _median_s(
            lambda: opened.append(device.open(other.handle, nbytes)), lambda: device.close(opened.pop())
        )
    return f"opening {nbytes // MIB} MiB by handle {seconds * 1e3:.3f} ms"


def _copied(device: Device, target: int, source: int, nbytes: int, stream: int) -> None:
    device.copy(target, source, nbytes, stream)
    device.synchronize(stream)


def _median_s(action: Callable[[], object], undo: Callable[[], object] = lambda: None) -> float:
    seconds = []
    for _ in range(_REPEATS):
        begun = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - begun)
        undo()
    return statistics.median(seconds)


class _Holder:
    """Another process with memory on the GPU, until it is killed."""

    def __init__(self, nbytes: int) -> None:
        program = f"from {_MODULE} import hold; hold({nbytes})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout
        self.handle = bytes.fromhex(self._process.stdout.readline())

    def __enter__(self) -> "_Holder":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def hold(nbytes: int) -> None:
    """Allocate memory, print its handle, and wait for the end."""
    device = _device()
    print(device.handle_of(device.allocate(nbytes)).hex(), flush=True)
    sys.stdin.read()


def _left_behind() -> str:
    device = _device()
    before = device.free_bytes()
    with _Holder(GIB) as other:
        taken = before - device.free_bytes()
    kept = before - _settled_free_bytes(device)
    with _Holder(GIB) as other:
        pointer = device.open(other.handle, GIB)
    mapped = before - _settled_free_bytes(device)
    device.close(pointer)
    closed = before - _settled_free_bytes(device)
    return (
        f"of {taken // MIB} MiB that a process had, {kept // MIB} MiB are left when it is killed; "
        f"{mapped // MIB} MiB while another one has it open, {closed // MIB} MiB when that has closed it"
    )


def _settled_free_bytes(device: Device) -> int:
    """Return what is free when the driver has cleaned up after a process."""
    time.sleep(2.0)
    return device.free_bytes()


QUESTIONS: Mapping[str, Question] = {
    "exchange": Question(
        "Does an IPC handle of a `cudaMalloc` slab that one process exports open in another, and are 256 random bytes "
        "the same there?",
        _exchange,
    ),
    "handles": Question(
        "Do 0, 63 and 65 bytes, random ones, one's own handle and another GPU's fail with a clear error, and does the "
        "process live on?",
        _bad_handles,
    ),
    "export": Question(
        "Can memory of JAX's default allocator be exported, with preallocation and without, and what does a failure "
        "leave behind?",
        _export_from_jax,
    ),
    "namespaces": Question("Do handles need a shared PID namespace, a shared IPC namespace, or both?", _namespaces),
    "donation": Question("Does donating an imported buffer abort the process?", _donation),
    "deleter": Question("Does the deleter of an imported buffer run before the GPU has read it?", _deleter),
    "events": Question(
        "Are interprocess events to be had, and does JAX wait for them through `__dlpack__(stream)`?", _events
    ),
    "dead": Question(
        "Does a stream go on that waits for an event, when the process that recorded it is killed or destroys it "
        "before its GPU has come to that?",
        _dead_events,
    ),
    "mps": Question("What does MPS do when only one of two processes uses it?", _mixed_mps),
    "costs": Question("What does a copy on the device cost, against exporting the worker's memory?", _costs),
    "left": Question(
        "Does a process that is killed leave memory behind on the GPU, in the other process's count or its own?",
        _left_behind,
    ),
}


if __name__ == "__main__":
    sys.exit(main())
