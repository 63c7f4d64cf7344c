"""GPU checks of the doctors: driver, devices, CuPy, settings, live sharing of GPU memory.

Never imports a framework: package metadata shows the versions. Imports CuPy only on a host with a
GPU.
"""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from bridge_wire.doctor import cuda_exchange
from bridge_wire.doctor.checks import OK, Check, broken, ok, slow
from bridge_wire.doctor.exchange import NBYTES
from bridge_wire.doctor.host import CUPY, installed
from bridge_wire.errors import CudaError, WorldError
from bridge_wire.memory import cuda
from bridge_wire.memory.cuda import Gpu
from bridge_wire.memory.cuda_words import EVENTS, HOST, WORDS

BY_HOST = "tensors on the GPU travel through the host"

_DRIVER = "NVIDIA driver"
_VERSION_FILE = Path("/proc/driver/nvidia/version")
_EXPOSE = (
    "for a GPU, install the driver, or run the container with --gpus; CPU tensors do not"
    " need it"
)
_PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"
_OFF = ("", "false", "False", "0")  # XLA's client reads every other value as on
_XLA_FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
_ALLOCATOR_SETTINGS = (
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_NO_CUDA_MEMORY_CACHING",
    _PREALLOCATE,
    "XLA_PYTHON_CLIENT_ALLOCATOR",
    *_XLA_FRACTIONS,
    "TF_GPU_ALLOCATOR",
)
# gVisor's kernel version, the same on every machine.
_GVISOR = "#1 SMP Sun Jan 10 15:06:54 PST 2016"


class _Told(NamedTuple):
    """Facts about a device that only nvidia-smi reports."""

    driver: str
    mode: str  # compute mode


def checks() -> Iterator[Check]:
    """Check the driver, the GPUs and CuPy. A host without a driver is ok."""
    try:
        driver = cuda.driver()
        gpus = driver.gpus()
    except CudaError as error:
        yield _no_driver(error)
        return
    told = _nvidia_smi()
    versions = {each.driver for each in told.values()}
    yield ok(
        _DRIVER,
        f"{', '.join(sorted(versions)) or _kernel_s_version()}, for CUDA {driver.version()}",
    )
    yield _devices(gpus, told)
    yield from _modes(gpus, told)
    cupy = _cupy(driver.version())
    yield cupy
    yield _allocators(os.environ)
    yield ok(
        "MPS",
        "its daemon's pipes are here"
        if has_mps()
        else "off: processes take turns on a GPU",
    )
    if cupy.verdict == OK:
        yield from map(exchanged, gpus)


def has_mps() -> bool:
    """Whether an MPS daemon's pipe directory exists, at the configured path or CUDA's default."""
    return Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")).exists()


def exchanged(gpu: Gpu) -> Check:
    """Check whether a child process can open this process's GPU memory, and the way to wait."""
    name = f"memory of cuda:{gpu.ordinal}"
    found = f"{NBYTES} random bytes crossed to a child and back"
    refused = []
    for way in (WORDS, EVENTS):
        try:
            cuda_exchange.with_child(gpu.uuid, way)
        except WorldError as error:
            refused.append(f"{way}: {error}")
        else:
            without = "".join(f"; not by {reason}" for reason in refused)
            return ok(name, f"{found}, in order by {way}{without}")
    try:
        cuda_exchange.with_child(gpu.uuid, HOST)
    except WorldError as error:
        return slow(name, f"{error}: {BY_HOST}", remedy())
    return slow(
        name,
        f"{found}, in order only by waiting for the GPU on the host ({'; '.join(refused)})",
        f"each call waits for the GPU; to use words, a newer driver; to use events: {remedy()}",
    )


def remedy() -> str:
    """Return a remedy for handles that do not open in another process."""
    if "microsoft" in platform.release().lower():
        return "WSL2 has no CUDA IPC: use Linux itself"
    if platform.version() == _GVISOR:
        return "gVisor passes no CUDA IPC: use another container runtime"
    return (
        "give the processes one user; in containers, process numbers that differ, as in one PID"
        " namespace (`pid: service:namespaces`), for memory, and one /dev/shm (`ipc:"
        " service:namespaces`) for events; see docs/gpu.md"
    )


def _no_driver(error: CudaError) -> Check:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    # libcuda.so.1 loads, but does not initialise.
    if not isinstance(error.__cause__, OSError):
        hint = "" if visible is None else f"change CUDA_VISIBLE_DEVICES={visible!r}; "
        return slow(_DRIVER, str(error), hint + _EXPOSE)
    if _VERSION_FILE.exists():
        return slow(_DRIVER, "loaded, but not visible here", _EXPOSE)
    return ok(_DRIVER, "no NVIDIA driver")


def _kernel_s_version() -> str:
    try:
        found = re.search(r"Module +(?:for \S+ +)?([\d.]+)", _VERSION_FILE.read_text())
    except OSError:
        found = None
    return found[1] if found else "unknown version"


def _nvidia_smi() -> Mapping[str, _Told]:
    """Return nvidia-smi's facts by UUID, including hidden devices; empty if nvidia-smi is missing
    or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    query = [
        program,
        "--query-gpu=uuid,driver_version,compute_mode",
        "--format=csv,noheader",
    ]
    try:
        answer = subprocess.run(
            query, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    rows = [
        [part.strip() for part in line.split(",")]
        for line in answer.stdout.splitlines()
    ]
    return {row[0]: _Told(*row[1:]) for row in rows if len(row) == 3}


def _devices(gpus: tuple[Gpu, ...], told: Mapping[str, _Told]) -> Check:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    setting = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible!r})"
    hidden = told.keys() - {gpu.label for gpu in gpus}
    listed = ", ".join(f"cuda:{gpu.ordinal} {gpu.name} {gpu.label}" for gpu in gpus)
    return ok(
        "GPUs",
        listed + setting + (f"; hidden: {', '.join(sorted(hidden))}" if hidden else ""),
    )


def _modes(gpus: tuple[Gpu, ...], told: Mapping[str, _Told]) -> Iterator[Check]:
    """Report each GPU in an exclusive compute mode: client and worker cannot share it."""
    for gpu in gpus:
        mode = told[gpu.label].mode if gpu.label in told else "Default"
        if mode != "Default":
            yield slow(
                f"mode of cuda:{gpu.ordinal}",
                f"{mode}: only one process at a time may use the GPU",
                f"as root: nvidia-smi -i {gpu.label} -c DEFAULT, or start MPS",
            )


def _cupy(driver: str) -> Check:
    """Check that one CuPy package is installed, for a CUDA version that the driver supports."""
    name, package = "CuPy", "pip install torch-jax-bridge[cuda]"
    found = {each: version for each in CUPY if (version := installed(each))}
    listed = ", ".join(f"{each} {version}" for each, version in found.items())
    if not found:
        return slow(name, f"not installed: {BY_HOST}", package)
    if len(found) > 1:
        return slow(
            name,
            f"{listed}: they overwrite each other",
            f"pip uninstall {' '.join(found)}, then {package}",
        )
    built_for = re.search(r"cuda(\d+)x", listed)
    if built_for and int(built_for[1]) > int(driver.partition(".")[0]):
        return slow(
            name,
            f"{listed}, but the driver supports CUDA {driver}: {BY_HOST}",
            f"install a newer driver, or cupy-cuda{driver.partition('.')[0]}x",
        )
    return ok(name, listed)


def _allocators(environment: Mapping[str, str]) -> Check:
    """Check the settings of torch's and JAX's allocators.

    The bridge works with any settings, by a copy on the device.
    """
    name = "GPU allocators"
    found = ", ".join(
        f"{each}={environment[each]}"
        for each in _ALLOCATOR_SETTINGS
        if each in environment
    )
    if all(each in environment for each in _XLA_FRACTIONS):
        return broken(
            name,
            f"{found}: JAX refuses to start with both",
            f"unset {_XLA_FRACTIONS[1]}",
        )
    if environment.get(_PREALLOCATE, "") not in _OFF:
        return slow(
            name,
            f"{found}: JAX takes most of the memory, which other processes need too",
            f"set {_PREALLOCATE}=false; a worker disables preallocation by default",
        )
    if not environment.get(_PREALLOCATE) and installed("jax"):
        found = (
            f"{found or 'no setting'}; JAX takes 75 % of the memory when it starts, except in a"
            " worker"
        )
    return ok(name, found or "no setting")
