"""What the host, and the environment of this process, give the bridge: a doctor's checks for either side.

Frameworks are found by the metadata of their packages: nothing here imports them.
"""

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from bridge_wire import PROTOCOLS, exchange
from bridge_wire.checks import Check, broken, ok, slow
from bridge_wire.copying import usable_cores
from bridge_wire.errors import OutOfMemory, WorldError
from bridge_wire.namespaces import KINDS
from bridge_wire.slabs import PAGE, create_slab

_NEEDED = ("torch-jax-bridge", "grpcio", "grpcio-health-checking", "protobuf", "optree")
_FRAMEWORKS = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "torch", "torchax")
_CUPY = ("cupy-cuda12x", "cupy-cuda13x", "cupy")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
_MIB = 1 << 20
_BY_VALUE = "tensors travel by value over gRPC"


def checks() -> Iterator[Check]:
    """Look at everything that a client and a worker have in common."""
    yield ok(
        "system", f"{platform.system()} {platform.release()}, {platform.machine()}, {' '.join(platform.libc_ver())}"
    )
    yield ok("python", platform.python_version())
    yield ok("packages", _listed(_NEEDED) or "none is installed as a package")
    yield ok("frameworks", _listed((*_FRAMEWORKS, *_CUPY)) or "none")
    yield ok("protocol", "versions {} to {}".format(*PROTOCOLS))
    yield memfd()
    yield descriptor_passing()
    yield huge_pages()
    yield shared_memory_files()
    yield cores("cores", usable_cores(), _quota())
    yield namespaces()
    yield from gpus()


def installed(package: str) -> str | None:
    """Return the version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def memfd() -> Check:
    """Whether memory can be made that nobody can shrink under its users."""
    name = "memfd and seals"
    if not hasattr(os, "memfd_create"):
        return slow(name, f"this system has no memfd: {_BY_VALUE}", "use Linux 3.17 or newer")
    try:
        slab = create_slab(PAGE, 0)
    except OutOfMemory as error:
        return slow(name, f"{error}: {_BY_VALUE}", "free memory, or allow memfd_create in the sandbox")
    try:
        os.ftruncate(slab.fd, 0)
    except PermissionError:
        return ok(name, "work: a sealed memfd keeps its size")
    finally:
        slab.close()
    return broken(name, "a sealed memfd was shrunk: a peer could crash this process", "use another kernel or sandbox")


def descriptor_passing() -> Check:
    """Whether a child receives a slab over a Unix socket, and sees the same memory."""
    name = "descriptor passing"
    try:
        exchange.with_child()
    except WorldError as error:
        return slow(name, f"{error}: {_BY_VALUE}", "allow SCM_RIGHTS over Unix sockets in the sandbox")
    return ok(name, f"{exchange.NBYTES} random bytes crossed to a child and back, over a Unix socket")


def huge_pages() -> Check:
    """Whether the kernel backs large arrays with large pages; shared memory rarely has them."""
    name = "huge pages"
    private, shared = _chosen("enabled"), _chosen("shmem_enabled")
    found = f"{private or 'not told'}; for shared memory {shared or 'not told'}"
    if private == "never":
        return slow(name, found, f"as root: echo madvise > {_HUGE_PAGES}/enabled; 64 MiB calls gain 1.3 to 3 times")
    return ok(name, found)


def shared_memory_files() -> Check:
    """How large /dev/shm is, whose small default in containers is a trap for others."""
    try:
        space = os.statvfs("/dev/shm")
    except OSError:
        return ok("/dev/shm", "none, and the bridge needs none")
    return ok("/dev/shm", f"{space.f_blocks * space.f_frsize // _MIB} MiB, of which the bridge needs nothing")


def cores(name: str, usable: int, quota: float | None = None) -> Check:
    """Whether a client and a worker can run at the same time."""
    found = f"{usable} usable" if quota is None else f"{usable} usable, {quota:g} by quota"
    if usable > 1 and (quota is None or quota > 1):
        return ok(name, found)
    return slow(name, found, "give it two cores or more: on one, each call costs several sleeps and wake-ups")


def namespaces() -> Check:
    """The namespaces of this process, as the kernel calls them."""
    try:
        return ok("namespaces", " ".join(os.readlink(f"/proc/self/ns/{kind}") for kind in KINDS))
    except OSError:
        return ok("namespaces", "the system does not tell")


def gpus() -> Iterator[Check]:
    """The NVIDIA driver and its devices, by UUID; none is as it should be on a host without."""
    name = "NVIDIA driver"
    remedy = "for a GPU, install the driver, or run the container with --gpus; CPU tensors do not need it"
    program = shutil.which("nvidia-smi")
    if program is None:
        loaded = Path("/proc/driver/nvidia/version").exists()
        yield slow(name, "loaded, but not visible here", remedy) if loaded else ok(name, "no NVIDIA driver")
        return
    query = [program, "--query-gpu=uuid,name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        yield slow(name, f"nvidia-smi does not run: {error}", remedy)
        return
    devices = [[part.strip() for part in line.split(",")] for line in answer.stdout.splitlines()]
    if answer.returncode != 0 or not devices or any(len(device) != 3 for device in devices):
        said = (answer.stdout + answer.stderr).strip().partition("\n")[0]
        yield slow(name, f"nvidia-smi fails: {said or answer.returncode}", remedy)
        return
    yield ok(name, f"{devices[0][2]}; " + ", ".join(f"{model} {uuid}" for uuid, model, _ in devices))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    yield ok("GPUs to use", "all" if visible is None else f"CUDA_VISIBLE_DEVICES={visible!r}")
    pipes = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"))
    yield ok("MPS", "its daemon's pipes are here" if pipes.exists() else "off: processes take turns on a GPU")


def _listed(packages: tuple[str, ...]) -> str:
    found = ((package, installed(package)) for package in packages)
    return ", ".join(f"{package} {version}" for package, version in found if version)


def _chosen(setting: str) -> str | None:
    """Return the word in brackets of a setting such as "always [madvise] never"."""
    try:
        words = (_HUGE_PAGES / setting).read_text().split()
    except OSError:
        return None
    return next((word.strip("[]") for word in words if word.startswith("[")), None)


def _quota() -> float | None:
    """Return how many cores' time the control group allows; None for all."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return int(limit) / int(period)
    except (OSError, ValueError):  # no limit reads "max"
        return None
