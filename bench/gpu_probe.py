"""Probe of CUDA, its driver and JAX on this machine, for questions with contradictory sources.

`python -m bench.gpu_probe NAME` answers one question of docs/gpu.md in a line. `make gpu` asks each
question in its own process, since some end the process. The questions need a GPU, CuPy and JAX, and
change no setting of the GPU.
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

from bench import ROOT, gpu_pairs
from bench.gpu_pairs import Other, delay, device, keeping
from bridge_wire.doctor import cuda_exchange
from bridge_wire.doctor.gpu_checks import has_mps
from bridge_wire.doctor.host import installed
from bridge_wire.dtypes import BY_NAME
from bridge_wire.errors import CudaError, WorldError
from bridge_wire.memory.cuda import HANDLE_BYTES, Device, device_of, driver, gpus
from bridge_wire.memory.cuda_words import WAYS
from bridge_wire.memory.dlpack import DeviceExporter, keep_owners_by
from bridge_wire.specs import Spec

MIB, GIB = 1 << 20, 1 << 30
_MODULE = "bench.gpu_probe"
_COUNT = 1 << 20  # elements of the arrays for JAX
_FLOATS = Spec(BY_NAME["float32"], (_COUNT,))
_REPEATS = 20
_IMPORTS = 10
# BRIDGE_TESTS_REHEARSE=1 selects sizes for the faked CUDA, which computes on the CPU.
_REHEARSED = bool(os.environ.get("BRIDGE_TESTS_REHEARSE"))
# Matrix products for a second or more, in TF32.
_SIDE, _STEPS = (64, 50) if _REHEARSED else (4096, 4000)
_SIZES = (MIB,) if _REHEARSED else (64 * MIB, GIB)
_HELD = MIB if _REHEARSED else GIB
_PACKAGES = ("jax", "jaxlib", "torch", "cupy-cuda12x", "cupy-cuda13x")


class Question(NamedTuple):
    """A question of the table and its function."""

    text: str
    answer: Callable[[], str]


def main(argv: Sequence[str] | None = None) -> int:
    """Answer a question. Return the exit status: 1 without a GPU, else 0."""
    parser = argparse.ArgumentParser(
        "bench.gpu_probe", description="Answer a question of docs/gpu.md."
    )
    parser.add_argument("name", choices=QUESTIONS)
    options = parser.parse_args(argv)
    if not gpus():
        print("CUDA's driver shows no GPU here: nothing was asked")
        return 1
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    print(f"{options.name}: {QUESTIONS[options.name].answer()}", flush=True)
    return 0


def described() -> str:
    """Return the machine and the versions in one line."""
    models = ", ".join(gpu.name for gpu in gpus())
    packages = ", ".join(
        f"{name} {version}" for name in _PACKAGES if (version := installed(name))
    )
    system = f"Linux {platform.release()}, Python {platform.python_version()}"
    return f"{models}; CUDA {driver().version()}; {system}; {packages}"


def _ended(status: int) -> str:
    return f"the process ended with {status if status > 0 else signal.Signals(-status).name}"


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1][:200].replace("|", "/")


# Handles ------------------------------------------------------------------------------------------


def _exchange() -> str:
    return "; ".join(map(_crossing, WAYS))


def _crossing(way: str) -> str:
    try:
        cuda_exchange.with_child(gpus()[0].uuid, way)
    except WorldError as error:
        return f"{way}: no, {error}"
    return f"{way}: yes"


def _bad_handles() -> str:
    there = device()
    own = there.allocate(2 * MIB)
    handles = {
        "0 bytes": b"",
        "63 bytes": bytes(63),
        "65 bytes": bytes(65),
        "zeros": bytes(HANDLE_BYTES),
        "random": os.urandom(HANDLE_BYTES),
        "its own": there.handle_of(own),
    }
    if len(gpus()) > 1:
        other = device_of(gpus()[1].uuid)
        handles["another GPU's"] = other.handle_of(other.allocate(2 * MIB))
    found = [f"{name}: {_opening(there, handle)}" for name, handle in handles.items()]
    there.free(own)
    there.free(there.allocate(2 * MIB))
    return "; ".join([*found, "the process continues"])


def _opening(device: Device, handle: bytes) -> str:
    try:
        device.close(device.open(handle, 1))
    except CudaError as error:
        return str(error).rpartition("refused: ")[2]
    return "OPENED"


_SHM = 'sh -c \'mount -t tmpfs none /dev/shm && exec "$0" "$@"\''
_APART = {
    "own PIDs": "unshare --pid --fork",
    "own IPC namespace": "unshare --ipc",
    "own /dev/shm": f"unshare --mount {_SHM}",
    "own IPC namespace and /dev/shm": f"unshare --mount --ipc {_SHM}",
    "own PIDs and /dev/shm": f"unshare --mount --pid --fork {_SHM}",
}


def _namespaces() -> str:
    """Return the exchange with a child in other namespaces, as in another container.

    Needs the right to create namespaces. A PID namespace gives the child another number than this
    process, like two containers in one namespace. Two containers without a shared namespace may
    have equal numbers: therefore the first process of one namespace also exchanges with the first
    process of another.
    """
    found = [f"{name}: {_crossing_behind(prefix)}" for name, prefix in _APART.items()]
    command = [
        "unshare",
        "--pid",
        "--fork",
        sys.executable,
        "-c",
        f"import {_MODULE} as p; print(p.equal_pids())",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = (
        done.stdout.strip()
        if done.returncode == 0
        else f"not allowed here, or {_last_line(done.stderr)}"
    )
    return "; ".join([*found, f"equal PID numbers: {said}"])


def equal_pids() -> str:
    """Return the result of the exchange between two processes with the same PID.

    Call from the first process of a PID namespace.
    """
    return f"both are {os.getpid()}: {_crossing_behind('unshare --pid --fork')}"


def _crossing_behind(prefix: str) -> str:
    with (
        tempfile.TemporaryDirectory() as folder,
        _python(Path(folder), prefix) as works,
    ):
        return ", ".join(map(_crossing, WAYS)) if works else "not allowed here"


@contextlib.contextmanager
def _python(folder: Path, prefix: str) -> Any:
    """Run child processes behind a command; yield whether the command works."""
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
        return "not asked: no MPS daemon runs here"
    with tempfile.TemporaryDirectory() as folder:
        without = f"env CUDA_MPS_PIPE_DIRECTORY={folder}/none"
        with _python(Path(folder), without):
            return (
                f"handles to a process without MPS: {', '.join(map(_crossing, WAYS))}"
            )


# JAX ----------------------------------------------------------------------------------------------


def _export_from_jax() -> str:
    found = []
    for preallocate in ("true", "false"):
        variables = os.environ | {
            "XLA_PYTHON_CLIENT_PREALLOCATE": preallocate,
            "XLA_CLIENT_MEM_FRACTION": "0.2",
        }
        done = subprocess.run(
            [sys.executable, "-c", f"from {_MODULE} import export; print(export())"],
            cwd=ROOT,
            env=variables,
            capture_output=True,
            text=True,
        )
        said = (
            done.stdout.strip()
            if done.returncode == 0
            else f"{_ended(done.returncode)}: {_last_line(done.stderr)}"
        )
        found.append(f"preallocate={preallocate}: {said}")
    return "; ".join(found)


def export() -> str:
    """Try to export an array of JAX's allocator; return the outcome for the array and for JAX."""
    import jax.numpy as jnp

    array = jnp.ones(_COUNT)
    array.block_until_ready()
    try:
        device().handle_of(array.unsafe_buffer_pointer())
        found = "exported"
    except CudaError as error:
        found = str(error).rpartition("refused: ")[2]
    try:
        return (
            f"{found}, afterwards JAX computes"
            if (array * 3).sum() == 3 * _COUNT
            else f"{found}, JAX is WRONG"
        )
    except Exception as error:
        return f"{found}, afterwards JAX fails: {_last_line(str(error))}"


class _Owner:
    """An empty owner, whose end shows that the memory was released."""


def _imported(
    device: Device,
    pointer: int,
    wait: Callable[[int | None], None] = lambda stream: None,
) -> Any:
    """Return GPU memory as a JAX array, and a weak reference to the owner that JAX releases."""
    import jax
    import numpy as np

    keep_owners_by(lambda kept: np.frombuffer(kept, np.uint8).__dlpack__())
    owner = _Owner()
    array = jax.dlpack.from_dlpack(
        DeviceExporter(pointer, _FLOATS, owner, device.dlpack_device, wait)
    )
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

    there, step = device(), jax.jit(lambda x: x + 1, donate_argnums=0)
    pointer = _filled(there, 1.0)
    array, owner = _imported(there, pointer)
    result = step(array)
    result.block_until_ready()
    value = "right" if (result == 2).all() else "WRONG"
    written = "in place" if result.unsafe_buffer_pointer() == pointer else "elsewhere"
    return (
        f"no: the result is {value}, written {written}, the donated array"
        f" {'deleted' if array.is_deleted() else 'still there'}, its memory"
        f" {'kept' if owner() else 'released'}; an array with another reference:"
        f" {_donated_while_referred_to(there, step)}"
    )


def _donated_while_referred_to(there: Device, step: Callable[[Any], Any]) -> str:
    array, _ = _imported(there, _filled(there, 1.0))
    reference = (
        array.__dlpack__(stream=there.new_stream())
        if there.dlpack_type == 2
        else array.__dlpack__()
    )
    try:
        found = f"computed {float(step(array)[0])}, deleted {array.is_deleted()}"
    except Exception as error:
        found = f"{type(error).__name__}: {_last_line(str(error))}"
    del reference
    return found


def _deleter() -> str:
    import jax
    import jax.numpy as jnp

    there = device()
    weights = jnp.full((_SIDE, _SIDE), 1e-3)

    @jax.jit
    def late(x: Any) -> Any:
        work = jax.lax.fori_loop(0, _STEPS, lambda _, v: jnp.tanh(v @ weights), weights)
        return x + 1 + 0 * work[0, 0]

    late(jnp.zeros(_COUNT)).block_until_ready()
    array, owner = _imported(there, _filled(there, 1.0))
    result = late(array)
    del array
    gc.collect()
    has_run, is_ready = owner() is None, result.is_ready()
    result.block_until_ready()
    if is_ready:
        return "inconclusive: the result was ready too soon"
    return (
        "yes: the deleter ran before the GPU had read the buffer"
        if has_run
        else "no: the deleter had not run while the GPU computed"
    )


def _events() -> str:
    """Return JAX's streams, and whether JAX waits on GPU or CPU for an event a second late."""
    import jax

    jax.numpy.ones(3).block_until_ready()
    there = device()
    named: list[Any] = []
    for _ in range(_IMPORTS):
        _imported(there, _filled(there, 2.0), named.append)[0].block_until_ready()
    pointer, value = _filled(there, 1.0), _filled(there, 2.0)
    writing, event = there.new_stream(), there.new_event()
    delay(writing, 1.0)
    there.copy(pointer, value, _FLOATS.nbytes, writing)
    there.record(event, writing)
    begun = time.monotonic()
    array, _ = _imported(there, pointer, lambda stream: there.wait(event, stream))
    imported = time.monotonic() - begun
    result = array * 1
    computing = time.monotonic() - begun
    is_right = bool((result == 2).all())
    return (
        f"{'yes' if is_right else 'NO'}: {len(set(named))} streams in {_IMPORTS} imports, none"
        f" named {named.count(None)} times; of an event 1 s late the import took {imported:.3f} s,"
        f" a computation began after {computing:.3f} s, its values are"
        f" {'right' if is_right else 'WRONG'} after {time.monotonic() - begun:.2f} s"
    )


# Costs and leaks ----------------------------------------------------------------------------------


def _costs() -> str:
    return "; ".join([*map(_cost_of_a_copy, _SIZES), *map(_cost_of_opening, _SIZES)])


def _cost_of_a_copy(nbytes: int) -> str:
    there = device()
    source, target, stream = (
        there.allocate(nbytes),
        there.allocate(nbytes),
        there.new_stream(),
    )
    seconds = _median_s(lambda: _copied(there, target, source, nbytes, stream))
    for pointer in (source, target):
        there.free(pointer)
    return f"copy of {nbytes // MIB} MiB {seconds * 1e3:.3f} ms ({nbytes / seconds / 1e9:.0f} GB/s)"


def _cost_of_opening(nbytes: int) -> str:
    there, opened = device(), []
    with Other(keeping, nbytes) as other:
        handle = bytes.fromhex(other.said())
        seconds = _median_s(
            lambda: opened.append(there.open(handle, nbytes)),
            lambda: there.close(opened.pop()),
        )
    return f"opening {nbytes // MIB} MiB by handle {seconds * 1e3:.3f} ms"


def _copied(device: Device, target: int, source: int, nbytes: int, stream: int) -> None:
    device.copy(target, source, nbytes, stream)
    device.synchronize(stream)


def _median_s(
    action: Callable[[], object], undo: Callable[[], object] = lambda: None
) -> float:
    seconds = []
    for _ in range(_REPEATS):
        begun = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - begun)
        undo()
    return statistics.median(seconds)


def _left_behind() -> str:
    there = device()
    before = there.free_bytes()
    with Other(keeping, _HELD) as other:
        other.said()
        taken = before - there.free_bytes()
    kept = before - _settled_free_bytes(there)
    with Other(keeping, _HELD) as other:
        pointer = there.open(bytes.fromhex(other.said()), _HELD)
    mapped = before - _settled_free_bytes(there)
    there.close(pointer)
    closed = before - _settled_free_bytes(there)
    return (
        f"of a process's {taken // MIB} MiB, {kept // MIB} MiB are left after its kill;"
        f" {mapped // MIB} MiB while another process has the memory open, {closed // MIB} MiB after"
        " that process has closed it"
    )


def _settled_free_bytes(device: Device) -> int:
    """Return the free bytes after the driver's cleanup of a process."""
    time.sleep(2.0)
    return device.free_bytes()


QUESTIONS: Mapping[str, Question] = {
    "exchange": Question(
        "Does an IPC handle of a `cudaMalloc` slab that one process exports open in another, and"
        " are 256 random bytes the same there?",
        _exchange,
    ),
    "handles": Question(
        "Do 0, 63 and 65 bytes, random ones, one's own handle and another GPU's fail with a clear"
        " error, and does the process live on?",
        _bad_handles,
    ),
    "export": Question(
        "Can memory of JAX's default allocator be exported, with preallocation and without, and"
        " does JAX still work after a failure?",
        _export_from_jax,
    ),
    "namespaces": Question(
        "Which namespaces must both processes share for handles, events and words: PIDs, IPC,"
        " /dev/shm?",
        _namespaces,
    ),
    "donation": Question(
        "Does donating an imported buffer abort the process?", _donation
    ),
    "deleter": Question(
        "Does the deleter of an imported buffer run before the GPU has read it?",
        _deleter,
    ),
    "events": Question(
        "Does JAX wait for an event through `__dlpack__(stream)` on the GPU, and on which of its"
        " streams?",
        _events,
    ),
    "words": Question(
        "Do streams of two processes wait for words in shared memory, and does the survivor release"
        " its own?",
        gpu_pairs.words,
    ),
    "rerecorded": Question(
        "Does a later record of an event, on another stream, change a wait for it that is pending"
        " in another process?",
        gpu_pairs.rerecorded,
    ),
    "opening": Question(
        "Do opening and closing handles and events wait while a kernel runs there, or here?",
        gpu_pairs.opening,
    ),
    "destroyed": Question(
        "How does an opened event that had passed behave once its owner has destroyed it or was"
        " killed?",
        gpu_pairs.destroyed,
    ),
    "dead": Question(
        "Does a stream go on that waits for an event, when the process that recorded it is killed"
        " or destroys it before its GPU has come to that?",
        gpu_pairs.dead_events,
    ),
    "mps": Question(
        "How does MPS behave when only one of two processes uses it?", _mixed_mps
    ),
    "costs": Question(
        "How much does a copy on the device cost, compared with exporting the worker's memory?",
        _costs,
    ),
    "left": Question(
        "Does a process that is killed leave memory behind on the GPU, in the other process's count"
        " or its own?",
        _left_behind,
    ),
}


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # CUDA's shutdown may never finish with a hanging stream
