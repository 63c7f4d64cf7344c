"""Checks of `bridge_client doctor`: the host, the environment, a worker and its connection.

Imports no framework.
"""

import contextlib
import os
import statistics
import time
from collections.abc import Iterator

from bridge_client.commands import canary
from bridge_client.commands.health import SERVING, health_of
from bridge_client.remote.lanes import Lane, Stale
from bridge_client.remote.link import Link, Terms
from bridge_client.remote.session import Fixed, RemoteSession
from bridge_wire import __version__
from bridge_wire.doctor import exchange, gpu_checks, host, namespaces
from bridge_wire.doctor.checks import Check, broken, ok, slow
from bridge_wire.errors import (
    BridgeError,
    CallTimeout,
    CudaError,
    OutOfMemory,
    Unauthenticated,
    VersionMismatch,
)
from bridge_wire.memory.cuda import device_of, label_of
from bridge_wire.memory.cuda_memory import UNIT, GpuPool, copy_to_device
from bridge_wire.memory.cuda_words import HOST
from bridge_wire.memory.pool import Pool
from bridge_wire.memory.slabs import memfd_works
from bridge_wire.pb import bridge_pb2 as pb

# Limits far beyond a healthy system's latency, not the latency of a fast system. The worker's host
# may be far away.
_SLOW_PING_S = 0.1
_SLOW_LANE_S = {"local": 0.005, "grpc": 0.1}
_EXCHANGES = 200
_CANARY_S = 60.0

_REMEDIES: dict[type[BridgeError], str] = {
    CallTimeout: "the worker is stopped, or its host overloaded: look at the worker's log",
    Unauthenticated: "give its token with --token-file, BRIDGE_TOKEN or BRIDGE_TOKEN_FILE",
    VersionMismatch: "install matching releases of torch-jax-bridge on both sides",
}
_NOT_THERE = (
    "start the worker, or use the address in its line `bridge_server ready`; with TLS, give"
    " --tls-ca"
)


def examine(address: str | None, terms: Terms) -> Iterator[Check]:
    """Check this host and, given an address, the worker at the address."""
    yield from host.checks()
    yield from gpu_checks.checks()
    if address is None:
        return
    try:
        yield from _reached(address, terms)
        yield _answered(address, terms)
    except (BridgeError, Stale) as error:
        remedy = next(
            (text for kind, text in _REMEDIES.items() if isinstance(error, kind)),
            _NOT_THERE,
        )
        yield broken(
            "worker", str(error) or "the worker exited during the checks", remedy
        )


def _reached(address: str, terms: Terms) -> Iterator[Check]:
    with health_of(address, terms.tls) as health:
        yield _health(health.status())
        yield _latency("gRPC ping", health.latency_s(), _SLOW_PING_S)
    fallbacks: list[str] = []
    link = Link(address, terms, fallbacks.append)
    pool, held = Pool(shareable=memfd_works()), contextlib.ExitStack()
    try:
        yield from _described(link.description)
        yield _path(link, fallbacks)
        block = pool.lease(exchange.NBYTES)
        lane = link.take(pool)
        if link.memory == "memfd":
            block.buffer[:] = os.urandom(block.nbytes)
            yield _seen_alike(
                bytes(block.buffer), lane.peek(block.address, block.nbytes)
            )
        yield _latency(f"{lane.name} lane", _exchange_s(lane), _SLOW_LANE_S[lane.name])
        link.give_back(lane)
        if link.description.gpu.uuid:
            yield _gpu(link, pool, held)
    finally:
        link.close()  # the worker must unmap GPU memory before `held` frees the memory
        held.close()
        pool.close()


def _answered(address: str, terms: Terms) -> Check:
    with RemoteSession(Fixed(address), terms, _CANARY_S) as session:
        begun = time.perf_counter()
        done = canary.run(session, _CANARY_S)
        return ok("a call", f"{done} in {time.perf_counter() - begun:.2g} s")


def _health(status: str) -> Check:
    if status == SERVING:
        return ok("health", status)
    return broken(
        "health",
        status,
        "wait until its models are warm; if it shuts down, start another worker",
    )


def _described(about: pb.DescribeReply) -> Iterator[Check]:
    versions = (
        f"torch-jax-bridge {about.version}, {about.framework} {about.framework_version}"
    )
    yield ok(
        "worker",
        f"{versions}, Python {about.python_version}; this client {__version__}",
    )
    yield ok("its models", ", ".join(model.name for model in about.models))
    yield ok(
        "its devices",
        f"{', '.join(about.devices)}; 64-bit types {'exist' if about.x64 else 'are off'}",
    )
    if about.allocator == "system":
        yield slow(
            "its allocator",
            "the system's",
            "start it without BRIDGE_ALLOCATOR=system, or preload jemalloc",
        )
    else:
        yield ok("its allocator", about.allocator or "unknown")
    if about.cores:
        yield host.cores("its cores", about.cores)
    yield ok(
        "its namespaces",
        _compared(
            namespaces.digests(),
            {space.kind: space.digest for space in about.namespaces},
        ),
    )


def _compared(ours: dict[str, bytes], theirs: dict[str, bytes]) -> str:
    if not (ours and theirs):
        return "unknown"
    if ours[namespaces.HOST] != theirs.get(namespaces.HOST):
        return "on another system"
    shared = {kind: ours[kind] == theirs.get(kind) for kind in namespaces.KINDS}
    common = " ".join(kind for kind, is_shared in shared.items() if is_shared)
    own = " ".join(kind for kind, is_shared in shared.items() if not is_shared)
    return f"on this system, in common: {common or 'none'}" + (
        f"; its own: {own}" if own else ""
    )


def _path(link: Link, fallbacks: list[str]) -> Check:
    """Check the lane and the memory kind: slow if a faster path is possible."""
    found = f"lane {link.lane_name}, memory {link.memory}"
    if not fallbacks:
        return ok("path", found)
    system = next(
        (s.digest for s in link.description.namespaces if s.kind == namespaces.HOST),
        None,
    )
    if system is not None and system != namespaces.digests().get(namespaces.HOST):
        return ok("path", f"{found}, as to any other system")
    return slow(
        "path",
        f"{found}: {fallbacks[0]}",
        "on one host, give both the same user id and the directory of the worker's socket, and"
        " connect by unix:PATH",
    )


def _seen_alike(written: bytes, seen: bytes) -> Check:
    name = "shared memory"
    if seen == written:
        return ok(
            name, f"the worker sees {len(written)} random bytes as they were written"
        )
    return broken(
        name,
        "the worker sees other bytes than were written",
        "connect with lane='grpc', and report this",
    )


def _gpu(link: Link, pool: Pool, held: contextlib.ExitStack) -> Check:
    """Check that the worker reads this process's bytes on the GPU, and report the way of ordering.

    `held` releases the check's GPU memory.
    """
    name, about = "its GPU", link.description.gpu
    label = f"{about.name} {label_of(about.uuid)}"
    try:
        device = device_of(about.uuid)
        written = os.urandom(exchange.NBYTES)
        gpu = GpuPool(device, max_bytes=UNIT)
        held.callback(gpu.close)
        block = gpu.lease(len(written))
        copy_to_device(device, block.pointer, written)
        lane = link.take(pool, None, gpu)
        seen = lane.peek(block.address, len(written))
        way = HOST if lane.ordering is None else lane.ordering.way
        link.give_back(lane)
    except (CudaError, OutOfMemory) as error:
        return slow(
            name, f"{label}: {error}: {gpu_checks.BY_HOST}", gpu_checks.remedy()
        )
    if seen != written:
        return broken(
            name,
            f"{label}: the worker sees other bytes than were written",
            "report this",
        )
    found = (
        f"{label}: memory cuda_ipc; the worker sees {len(written)} random bytes as they were"
        " written"
    )
    if way == HOST:
        return slow(
            name,
            f"{found}, but each call waits for the GPU on the host",
            gpu_checks.remedy(),
        )
    return ok(name, f"{found}, in order by {way}")


def _exchange_s(lane: Lane) -> float:
    """Return the median round-trip time of a request on a lane."""
    durations = []
    for _ in range(_EXCHANGES):
        begun = time.perf_counter()
        lane.release(())
        durations.append(time.perf_counter() - begun)
    return statistics.median(durations)


def _latency(name: str, median_s: float, limit_s: float) -> Check:
    found = f"{median_s * 1e3:.3f} ms"
    if median_s <= limit_s:
        return ok(name, found)
    return slow(
        name,
        f"{found}; usual: under {limit_s * 1e3:g} ms",
        "look for other load on either side",
    )
