"""A worker: assembles, starts, drains and closes the gRPC server and the local lanes.

Imports no framework.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from bridge_server.process.certificates import Certificates
from bridge_server.process.endpoints import Endpoint, listens
from bridge_server.process.tokens import Tokens
from bridge_server.runtime import Runtime
from bridge_server.serving.admission import Entrance
from bridge_server.serving.local_lanes import LocalLanes
from bridge_server.serving.programs import Programs
from bridge_server.serving.service import MAX_THREADS, Service
from bridge_server.serving.sessions import Sessions
from bridge_server.serving.watchdog import Watchdog
from bridge_wire.errors import CallerError
from bridge_wire.pb import bridge_pb2 as pb
from bridge_wire.pb.bridge_pb2_grpc import add_BridgeServicer_to_server

_log = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["Bridge"].full_name
# Services of the health protocol: whether the worker takes calls, and whether its runs end.
READINESS, LIVENESS = "readiness", "liveness"
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_LAST_BYTES_S = 0.5  # for bytes that gRPC has not sent yet
_OPTIONS = (
    # Room for signatures with very many leaves; tensors come in chunks.
    ("grpc.max_receive_message_length", 16 << 20),
    ("grpc.keepalive_time_ms", 60_000),  # detects clients whose machine has vanished
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.so_reuseport", 0),  # a second worker on the same port must fail
)


@dataclass(frozen=True, slots=True)
class Security:
    """Access control over gRPC: tokens of clients, TLS, and whether reflection is served."""

    tokens: Tokens
    certificates: Certificates | None = None
    reflection: bool = True

    @property
    def is_any(self) -> bool:
        return bool(self.tokens.are_required or self.certificates)

    @property
    def is_clear_text(self) -> bool:
        """Whether clients send tokens without TLS."""
        return self.tokens.are_required and self.certificates is None

    def reload(self) -> None:
        """Read the files of tokens and certificates again."""
        self.tokens.reload()
        if self.certificates is not None:
            self.certificates.reload()


class Worker:
    """Serves one runtime's models at one endpoint."""

    def __init__(
        self,
        runtime: Runtime,
        programs: Programs,
        sessions: Sessions,
        endpoint: Endpoint,
        security: Security,
        stuck_s: float,
        on_stuck: Callable[[], None] = lambda: None,
    ) -> None:
        """Begin to listen. `on_stuck` is called once a run takes longer than `stuck_s` seconds."""
        self._sessions = sessions
        self._on_stuck = on_stuck
        self._endpoint = endpoint
        self._health = health.HealthServicer()
        # The pool starts threads on demand.
        pool = futures.ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="grpc")
        self._server = grpc.server(
            pool, interceptors=[Entrance(security.tokens)], options=_OPTIONS
        )
        self._service = Service(runtime, programs, sessions, endpoint.lane_path)
        add_BridgeServicer_to_server(self._service, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if security.reflection:
            reflection.enable_server_reflection(
                (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
            )
        self._announce(is_ready=False)
        self._health.set(LIVENESS, _SERVING)
        self._watchdog = Watchdog(sessions, stuck_s, self._note_stuck)
        with _private_files():
            self.address = self._listen(security)
            _remove_stale_socket(endpoint.lane_path)
            self._lanes = LocalLanes(endpoint.lane_path, sessions)
        self._server.start()
        self._lanes.start()

    def announce_ready(self) -> None:
        """Report healthy to health probes."""
        self._announce(is_ready=True)

    def drain(self, grace_s: float) -> bool:
        """Refuse new work and wait for the running calls; return whether all have finished."""
        self._announce(is_ready=False)
        return self._sessions.drain(grace_s)

    def close(self) -> None:
        """End every connection and remove the sockets."""
        self._sessions.is_draining = True
        self._watchdog.close()
        self._lanes.close()
        self._service.end_idle_lanes()
        self._server.stop(_LAST_BYTES_S).wait()
        self._remove_socket()

    def remove_sockets(self) -> None:
        """Remove the sockets of a worker that exits without `close`."""
        with contextlib.suppress(OSError):
            os.unlink(self._endpoint.lane_path)
        self._remove_socket()

    def _remove_socket(self) -> None:
        if self.address.startswith("unix:"):
            with contextlib.suppress(OSError):
                os.unlink(self.address.removeprefix("unix:"))

    def _announce(self, *, is_ready: bool) -> None:
        for name in ("", SERVICE, READINESS):
            self._health.set(name, _SERVING if is_ready else _NOT_SERVING)

    def _note_stuck(self, is_stuck: bool) -> None:
        self._health.set(LIVENESS, _NOT_SERVING if is_stuck else _SERVING)
        if is_stuck:
            self._on_stuck()

    def _listen(self, security: Security) -> str:
        address = self._endpoint.address
        if address.startswith("unix:"):
            _remove_stale_socket(address.removeprefix("unix:"))
        try:
            if security.certificates is not None:
                credentials = security.certificates.credentials()
                port = self._server.add_secure_port(address, credentials)
            else:
                port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise CallerError(
                f"cannot listen on {address}: another program may listen there, or this host lacks"
                f" the address ({error})"
            ) from error
        return (
            address
            if address.startswith("unix:")
            else f"{address.rpartition(':')[0]}:{port}"
        )


@contextlib.contextmanager
def _private_files() -> Iterator[None]:
    previous = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(previous)


def _remove_stale_socket(path: str) -> None:
    """Remove the socket of a killed worker, but never the socket of a running worker."""
    if listens(path):
        raise CallerError(
            f"another worker listens at {path}; stop it or choose another --listen"
        )
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
