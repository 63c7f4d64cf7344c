"""What the host, and the environment of this process, give the bridge: a doctor's checks for either
side.

Frameworks are found by the metadata of their packages: nothing here imports them.
"""

import os
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from bridge_wire import PROTOCOLS
from bridge_wire.doctor import exchange
from bridge_wire.doctor.checks import Check, broken, ok, slow
from bridge_wire.doctor.namespaces import KINDS
from bridge_wire.errors import OutOfMemory, WorldError
from bridge_wire.memory.copying import usable_cores
from bridge_wire.memory.slabs import PAGE, create_slab

_NEEDED = ("torch-jax-bridge", "grpcio", "grpcio-health-checking", "protobuf", "optree")
_FRAMEWORKS = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "torch", "torchax")
CUPY = ("cupy-cuda12x", "cupy-cuda13x", "cupy")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
_MIB = 1 << 20
_BY_VALUE = "tensors travel by value over gRPC"


def checks() -> Iterator[Check]:
    """Look at everything that a client and a worker have in common."""
    yield ok(
        "system",
        f"{platform.system()} {platform.release()}, {platform.machine()},"
        f" {' '.join(platform.libc_ver())}",
    )
    yield ok("python", platform.python_version())
    yield ok("packages", _listed(_NEEDED) or "none is installed as a package")
    yield ok("frameworks", _listed((*_FRAMEWORKS, *CUPY)) or "none")
    yield ok("protocol", "versions {} to {}".format(*PROTOCOLS))
    yield memfd()
    yield descriptor_passing()
    yield huge_pages()
    yield shared_memory_files()
    yield cores("cores", usable_cores(), _quota())
    yield namespaces()


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
        return slow(
            name, f"{error}: {_BY_VALUE}", "free memory, or allow memfd_create in the sandbox"
        )
    try:
        os.ftruncate(slab.fd, 0)
    except PermissionError:
        return ok(name, "work: a sealed memfd keeps its size")
    finally:
        slab.close()
    return broken(
        name,
        "a sealed memfd was shrunk: a peer could crash this process",
        "use another kernel or sandbox",
    )


def descriptor_passing() -> Check:
    """Whether a child receives a slab over a Unix socket, and sees the same memory."""
    name = "descriptor passing"
    try:
        exchange.with_child()
    except WorldError as error:
        return slow(
            name, f"{error}: {_BY_VALUE}", "allow SCM_RIGHTS over Unix sockets in the sandbox"
        )
    return ok(
        name, f"{exchange.NBYTES} random bytes crossed to a child and back, over a Unix socket"
    )


def huge_pages() -> Check:
    """Whether the kernel backs large arrays with large pages; shared memory rarely has them."""
    name = "huge pages"
    private, shared = _chosen("enabled"), _chosen("shmem_enabled")
    found = f"{private or 'not told'}; for shared memory {shared or 'not told'}"
    if private == "never":
        return slow(
            name,
            found,
            f"as root: echo madvise > {_HUGE_PAGES}/enabled; 64 MiB calls gain 1.3 to 3 times",
        )
    return ok(name, found)


def shared_memory_files() -> Check:
    """How large /dev/shm is, whose small default in containers is a trap for others."""
    try:
        space = os.statvfs("/dev/shm")
    except OSError:
        return ok("/dev/shm", "none, and the bridge needs none")
    return ok(
        "/dev/shm",
        f"{space.f_blocks * space.f_frsize // _MIB} MiB, of which the bridge needs nothing",
    )


def cores(name: str, usable: int, quota: float | None = None) -> Check:
    """Whether a client and a worker can run at the same time."""
    found = f"{usable} usable" if quota is None else f"{usable} usable, {quota:g} by quota"
    if usable > 1 and (quota is None or quota > 1):
        return ok(name, found)
    return slow(
        name,
        found,
        "give it two cores or more: on one, each call costs several sleeps and wake-ups",
    )


def namespaces() -> Check:
    """The namespaces of this process, as the kernel calls them."""
    try:
        return ok("namespaces", " ".join(os.readlink(f"/proc/self/ns/{kind}") for kind in KINDS))
    except OSError:
        return ok("namespaces", "the system does not tell")


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
