"""The reference call: an empty gRPC unary call to another process, without protobuf.

Imports no framework.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import grpc

from bench import ROOT


class Ping:
    """A callable for one round trip, and a context manager that ends the serving process."""

    def __enter__(self) -> "Ping":
        self._directory = tempfile.TemporaryDirectory(prefix="bridge-bench-")
        address = f"unix:{self._directory.name}/ping.sock"
        command = [sys.executable, "-m", "bench.ping", address]
        self._server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
        )
        assert self._server.stdout
        self._server.stdout.readline()
        self._channel = grpc.insecure_channel(address)
        self._call: Callable[..., Any] = self._channel.unary_unary("/bench.Ping/Ping")
        return self

    def __call__(self) -> None:
        self._call(b"")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._channel.close()
        self._server.kill()  # after an orderly stop gRPC would log a GOAWAY
        self._server.communicate()
        self._directory.cleanup()


def _serve(address: str) -> None:
    """Answer until stdin ends, also by the parent's death."""
    server = grpc.server(ThreadPoolExecutor(1))
    handler: grpc.RpcMethodHandler[Any, Any] = grpc.unary_unary_rpc_method_handler(
        lambda request, context: b""
    )
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("bench.Ping", {"Ping": handler})]
    )
    server.add_insecure_port(address)
    server.start()
    print("ready", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    _serve(sys.argv[1])
