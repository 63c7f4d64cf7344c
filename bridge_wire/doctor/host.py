"""Host checks of both doctors: system, packages, shared memory, huge pages, cores, namespaces.

Never imports a framework: package metadata shows the versions.
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
_FRAMEWORKS = (
    "jax",
    "jaxlib",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "torch",
    "torchax",
)
CUPY = ("cupy-cuda12x", "cupy-cuda13x", "cupy")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
_MIB = 1 << 20
_BY_VALUE = "tensors travel by value over gRPC"


def checks() -> Iterator[Check]:
    """Run the checks common to client and worker."""
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
    """Check that sealed shared memory exists, which no peer can shrink."""
    name = "memfd and seals"
    if not hasattr(os, "memfd_create"):
        return slow(
            name, f"this system has no memfd: {_BY_VALUE}", "use Linux 3.17 or newer"
        )
    try:
        slab = create_slab(PAGE, 0)
    except OutOfMemory as error:
        return slow(
            name,
            f"{error}: {_BY_VALUE}",
            "free memory, or allow memfd_create in the sandbox",
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
    """Check that a child process receives a slab over a Unix socket and sees the same memory."""
    name = "descriptor passing"
    try:
        exchange.with_child()
    except WorldError as error:
        return slow(
            name,
            f"{error}: {_BY_VALUE}",
            "allow SCM_RIGHTS over Unix sockets in the sandbox",
        )
    return ok(
        name,
        f"{exchange.NBYTES} random bytes crossed to a child and back, over a Unix socket",
    )


def huge_pages() -> Check:
    """Check for huge pages behind large arrays; shared memory rarely has huge pages."""
    name = "huge pages"
    private, shared = _chosen("enabled"), _chosen("shmem_enabled")
    found = f"{private or 'unknown'}; for shared memory {shared or 'unknown'}"
    if private == "never":
        return slow(
            name,
            found,
            f"as root: echo madvise > {_HUGE_PAGES}/enabled; 64 MiB calls gain 1.3 to 3 times",
        )
    return ok(name, found)


def shared_memory_files() -> Check:
    """Report the size of /dev/shm, since its small default in containers breaks other software."""
    try:
        space = os.statvfs("/dev/shm")
    except OSError:
        return ok("/dev/shm", "none, and the bridge needs none")
    return ok(
        "/dev/shm",
        f"{space.f_blocks * space.f_frsize // _MIB} MiB, of which the bridge needs nothing",
    )


def cores(name: str, usable: int, quota: float | None = None) -> Check:
    """Check that client and worker can run at the same time."""
    found = (
        f"{usable} usable" if quota is None else f"{usable} usable, {quota:g} by quota"
    )
    if usable > 1 and (quota is None or quota > 1):
        return ok(name, found)
    return slow(
        name,
        found,
        "give it two cores or more: on one core, each call costs several sleeps and wake-ups",
    )


def namespaces() -> Check:
    """Report the kernel's names of this process's namespaces."""
    try:
        return ok(
            "namespaces",
            " ".join(os.readlink(f"/proc/self/ns/{kind}") for kind in KINDS),
        )
    except OSError:
        return ok("namespaces", "unknown: the system has no /proc/self/ns")


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
    """Return the control group's CPU quota in cores, or None without a quota."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return int(limit) / int(period)
    except (OSError, ValueError):  # no limit reads "max"
        return None
