"""Slabs are sealed memfds, and only such are mapped from a peer; whatever else comes is refused
and closed."""

import contextlib
import ctypes
import fcntl
import gc
import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bridge_wire.errors import OutOfMemory, ProtocolError
from bridge_wire.memory.slabs import PAGE, Slab, create_slab, map_received, memfd_works

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def make_memfd(nbytes: int = PAGE, seals: int = SEALS) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nbytes)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def mappings() -> int:
    """Return how many mappings of memfds this process has."""
    return Path("/proc/self/maps").read_text().count("/memfd:")


@contextlib.contextmanager
def new_slab() -> Iterator[Slab]:
    """A slab of two pages at the address 4096.

    No fixture: pytest would keep it until after the check for leaks.
    """
    slab = create_slab(2 * PAGE, PAGE)
    try:
        yield slab
    finally:
        slab.close()


@contextlib.contextmanager
def soft_limit(what: int, value: int) -> Iterator[None]:
    """Set a soft limit of this process, for no longer than the block: pytest itself writes files
    and opens them."""
    soft, hard = resource.getrlimit(what)
    resource.setrlimit(what, (value, hard))
    try:
        yield
    finally:
        resource.setrlimit(what, (soft, hard))


def test_slab_is_a_memfd_sealed_in_size() -> None:
    """A new slab's descriptor is a memfd of its size, closed on exec, with the seals SHRINK,
    GROW and SEAL."""
    with new_slab() as slab:
        assert fcntl.fcntl(slab.fd, fcntl.F_GET_SEALS) & SEALS == SEALS
        assert os.fstat(slab.fd).st_size == slab.nbytes == len(slab.view) == 2 * PAGE
        assert not os.get_inheritable(slab.fd)
        assert slab.base == PAGE


@pytest.mark.parametrize("nbytes", [0, PAGE, 4 * PAGE])
def test_sealed_slab_cannot_be_resized(nbytes: int) -> None:
    """Neither side can truncate or extend a slab under the other."""
    with new_slab() as slab, pytest.raises(PermissionError):
        os.ftruncate(slab.fd, nbytes)


def test_slab_has_no_name_in_the_file_system() -> None:
    """A slab is nowhere under /dev/shm: nothing has to be unlinked."""
    with new_slab() as slab:
        assert os.readlink(f"/proc/self/fd/{slab.fd}").startswith("/memfd:")
        assert os.fstat(slab.fd).st_nlink == 0


def test_slab_s_pages_are_present() -> None:
    """All of a slab's blocks are allocated at once: no late fault, and no SIGBUS when memory is
    short."""
    with new_slab() as slab:
        assert os.fstat(slab.fd).st_blocks * 512 >= slab.nbytes


def test_size_is_rounded_up_to_pages() -> None:
    """A slab of one byte more than a page has two."""
    slab = create_slab(PAGE + 1, 0)
    slab.close()
    assert slab.nbytes == 2 * PAGE


def test_unshareable_slab_has_no_descriptor() -> None:
    """A slab for this process alone has memory but no memfd, and closing it is nothing."""
    slab = create_slab(PAGE, 0, shareable=False)
    slab.view[:3] = b"abc"
    slab.close()
    assert slab.fd == -1 and ctypes.string_at(slab.pointer, 3) == b"abc"


def test_both_mappings_show_the_same_memory() -> None:
    """What one side writes through its mapping the other reads through its own, at another
    pointer."""
    with new_slab() as slab:
        received = map_received(os.dup(slab.fd), slab.nbytes, 1 << 40)
        slab.view[PAGE : PAGE + 5] = b"hello"
        assert bytes(received.view[PAGE : PAGE + 5]) == b"hello"
        assert received.pointer != slab.pointer
        assert (received.base, received.nbytes, received.fd) == (
            1 << 40,
            slab.nbytes,
            -1,
        )


def test_received_descriptor_is_closed() -> None:
    """map_received owns the descriptor it is given: after success it is closed."""
    with new_slab() as slab:
        fd = os.dup(slab.fd)
        map_received(fd, slab.nbytes, 0)
        assert not is_open(fd)


def test_mapping_lives_as_long_as_a_view_of_it() -> None:
    """The mapping outlives the slab object while a slice of its view is held, and goes with the
    last one."""
    with new_slab() as slab:
        before = mappings()
        received = map_received(os.dup(slab.fd), slab.nbytes, 0)
        held = received.view[10:20]
        slab.view[10:20] = b"0123456789"
        del received
        gc.collect()
        assert bytes(held) == b"0123456789"
        assert mappings() == before + 1
        del held
        gc.collect()
        assert mappings() == before


def unsealed() -> int:
    return make_memfd(seals=0)


def half_sealed() -> int:
    return make_memfd(seals=fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)


def unsealable() -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC)
    os.ftruncate(fd, PAGE)
    return fd


def read_only() -> int:
    fd = make_memfd(seals=SEALS | fcntl.F_SEAL_WRITE)
    return fd


def reopened_for_reading() -> int:
    fd = make_memfd()
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    finally:
        os.close(fd)


def path_only() -> int:
    fd = make_memfd()
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_PATH)
    finally:
        os.close(fd)


def pipe() -> int:
    reading, writing = os.pipe()
    os.close(writing)
    return reading


def directory() -> int:
    return os.open(tempfile.gettempdir(), os.O_RDONLY)


def regular_file() -> int:
    with tempfile.TemporaryFile() as file:
        file.truncate(PAGE)
        return os.dup(file.fileno())


def shared_memory_file() -> int:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.truncate(PAGE)
        return os.dup(file.fileno())


def device() -> int:
    return os.open("/dev/zero", os.O_RDWR)


NO_SLABS = [
    unsealed,
    half_sealed,
    unsealable,
    read_only,
    reopened_for_reading,
    path_only,
    pipe,
    directory,
    regular_file,
    shared_memory_file,
    device,
]


@pytest.mark.parametrize("make", NO_SLABS, ids=lambda make: make.__name__)
def test_what_is_no_sealed_memfd_is_refused(make: Callable[[], int]) -> None:
    """Anything but a sealed, writable memfd is a ProtocolError; the descriptor is closed and
    nothing mapped."""
    before = mappings()
    fd = make()
    with pytest.raises(ProtocolError):
        map_received(fd, PAGE, 0)
    assert not is_open(fd)
    assert mappings() == before


@pytest.mark.parametrize(
    "announced", [0, 1, PAGE - 1, PAGE, 3 * PAGE, 2**63, 2**64 - 1]
)
def test_wrong_size_is_refused(announced: int) -> None:
    """A sealed memfd of another size than was announced is a ProtocolError; the descriptor is
    closed."""
    fd = make_memfd(2 * PAGE)
    with pytest.raises(ProtocolError):
        map_received(fd, announced, 0)
    assert not is_open(fd)


@pytest.mark.parametrize("nbytes", [0, 100])
def test_memfd_of_no_whole_pages_is_refused(nbytes: int) -> None:
    """A memfd that is empty, or ends within a page, is a ProtocolError even where its size was
    announced."""
    with pytest.raises(ProtocolError):
        map_received(make_memfd(nbytes), nbytes, 0)


def test_memfd_larger_than_the_address_space_is_refused() -> None:
    """A sparse memfd that no process can map is a ProtocolError."""
    nbytes = 1 << 60
    with pytest.raises(ProtocolError, match="cannot map a slab"):
        map_received(make_memfd(nbytes), nbytes, 0)


def test_slab_that_the_kernel_refuses_is_out_of_memory() -> None:
    """A slab that the kernel has no room for is OutOfMemory, and leaves no descriptor behind."""
    before = len(os.listdir("/proc/self/fd"))
    refused = pytest.raises(OutOfMemory, match=f"a slab of {2 * PAGE} bytes")
    with soft_limit(resource.RLIMIT_FSIZE, PAGE), refused:
        create_slab(2 * PAGE, 0)
    assert len(os.listdir("/proc/self/fd")) == before


def test_slab_without_a_free_descriptor_is_out_of_memory() -> None:
    """When the process may open no more files, a slab is OutOfMemory that says so."""
    with (
        soft_limit(resource.RLIMIT_NOFILE, 3),
        pytest.raises(OutOfMemory, match="open files"),
    ):
        create_slab(PAGE, 0)


def test_shortage_of_descriptors_is_not_remembered() -> None:
    """Memfds that could not be had for want of descriptors can be had again when there are some."""
    with soft_limit(resource.RLIMIT_NOFILE, 3):
        assert not memfd_works()
    assert memfd_works()


def test_memfd_works_here() -> None:
    """This system has sealed memfds."""
    assert memfd_works()


def test_system_without_memfd_is_told_and_not_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the system has no memfds, `memfd_works` says so."""
    monkeypatch.delattr(os, "memfd_create")
    assert not memfd_works()


@pytest.mark.parametrize("step", ["posix_fallocate", "ftruncate"])
def test_interrupted_creation_leaves_nothing(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while a slab is made closes its memfd, whose pages would stay otherwise."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(os, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        create_slab(PAGE, 0)
    assert len(os.listdir("/proc/self/fd")) == len(before)
