"""Client of a worker's health service, for probes: needs no token, session or framework."""

import contextlib
import statistics
import time
from collections.abc import Iterator

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bridge_client.remote.grpc_lane import from_rpc
from bridge_client.remote.link import Tls, open_channel
from bridge_client.remote.worker_addresses import resolved
from bridge_wire.errors import CallTimeout, WorkerUnavailable

SERVING = "SERVING"
_POLL_S = 0.2


class Health:
    """The health service of one worker."""

    def __init__(self, stub: health_pb2_grpc.HealthStub, address: str) -> None:
        self._stub = stub
        self._address = address

    def status(
        self,
        timeout_s: float = 10.0,
        service: str = "",
    ) -> str:
        """Return "SERVING", or "NOT_SERVING" while the worker warms up or drains.

        `service` is "readiness", the default's meaning, or "liveness": whether its runs end.

        Raises:
          WorkerUnavailable: no worker answers.
          CallTimeout: the worker did not answer in time.
        """
        try:
            answer = self._stub.Check(
                health_pb2.HealthCheckRequest(service=service), timeout=timeout_s
            )
        except grpc.RpcError as error:
            raise from_rpc(error, address=self._address) from None
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))

    def wait(self, limit_s: float) -> str:
        """Return the status once it is "SERVING", or the last one after `limit_s` seconds.

        Raises:
          WorkerUnavailable, CallTimeout: no worker has answered until then.
        """
        deadline = time.monotonic() + limit_s
        while True:
            left_s = deadline - time.monotonic()
            try:
                status = self.status(max(left_s, _POLL_S))
                if status == SERVING or left_s <= 0:
                    return status
            except (WorkerUnavailable, CallTimeout):
                if left_s <= 0:
                    raise
            time.sleep(min(_POLL_S, max(left_s, 0.0)))

    def latency_s(self, times: int = 50) -> float:
        """Return the median round-trip time of a health request."""
        durations = []
        for _ in range(times):
            begun = time.perf_counter()
            self.status()
            durations.append(time.perf_counter() - begun)
        return statistics.median(durations)


@contextlib.contextmanager
def health_of(address: str, tls: Tls | None = None) -> Iterator[Health]:
    """Yield the health service of the worker at "unix:PATH" or "HOST:PORT".

    Raises:
      CallerError: the address has neither form.
    """
    address = resolved(address)
    with open_channel(address, tls) as channel:
        yield Health(health_pb2_grpc.HealthStub(channel), address)
