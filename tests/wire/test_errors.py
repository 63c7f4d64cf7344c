"""Every error travels: as a message, as a gRPC trailer, and each under the one status the table
gives it."""

import contextlib
import inspect
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest

from bridge_client.remote.grpc_lane import from_rpc
from bridge_wire import errors
from bridge_wire.errors import BridgeError, RemoteModelError
from bridge_wire.lane.frames import MAX_FRAME
from bridge_wire.pb import bridge_pb2 as pb

STATUS = {
    "BridgeError": "UNKNOWN",
    "CallerError": "INVALID_ARGUMENT",
    "ArgumentError": "INVALID_ARGUMENT",
    "SpecError": "INVALID_ARGUMENT",
    "DTypeError": "INVALID_ARGUMENT",
    "StructureError": "INVALID_ARGUMENT",
    "CopyNeeded": "INVALID_ARGUMENT",
    "UnknownModel": "NOT_FOUND",
    "TargetError": "INVALID_ARGUMENT",
    "SessionClosed": "FAILED_PRECONDITION",
    "RemoteModelError": "ABORTED",
    "PeerError": "FAILED_PRECONDITION",
    "ProtocolError": "INVALID_ARGUMENT",
    "VersionMismatch": "FAILED_PRECONDITION",
    "Unauthenticated": "UNAUTHENTICATED",
    "WorldError": "UNAVAILABLE",
    "WorkerUnavailable": "UNAVAILABLE",
    "WorkerDied": "UNAVAILABLE",
    "WorkerDraining": "UNAVAILABLE",
    "WorkerBusy": "RESOURCE_EXHAUSTED",
    "WorkerCrashed": "UNAVAILABLE",
    "StartupTimeout": "DEADLINE_EXCEEDED",
    "CallTimeout": "DEADLINE_EXCEEDED",
    "OutOfMemory": "RESOURCE_EXHAUSTED",
    "CudaError": "UNAVAILABLE",
    "ModelChanged": "FAILED_PRECONDITION",
    "LaneUnavailable": "UNAVAILABLE",
    "ResidualGone": "DATA_LOSS",
    "ProgramGone": "DATA_LOSS",
    "InternalError": "INTERNAL",
}
KINDS: list[type[BridgeError]] = [getattr(errors, name) for name in STATUS]
BUILTIN_BASES = {
    "DTypeError": TypeError,
    "StructureError": TypeError,
    "CopyNeeded": ValueError,
    "UnknownModel": LookupError,
    "WorkerUnavailable": ConnectionError,
    "StartupTimeout": TimeoutError,
    "CallTimeout": TimeoutError,
    "OutOfMemory": MemoryError,
}


def documented_tree() -> dict[str, str]:
    """Return the parent of each error of the tree in the module's docstring."""
    parents: dict[str, str] = {}
    above: list[str] = []
    for line in inspect.getdoc(errors).splitlines():
        words = line.split("── ")
        if len(words) == 2:
            depth, name = len(words[0]) // 4 + 1, words[1].split()[0]
            parents[name] = above[depth - 1]
            above[depth:] = [name]
        elif line == "BridgeError":
            above = [line]
    return parents


def travelled(error: BridgeError) -> BridgeError:
    return errors.decode(pb.Error.FromString(errors.encode(error).SerializeToString()))


def test_tree_is_as_documented() -> None:
    """The tree at the top of the module is the classes' own, and the table of statuses covers
    it."""
    parents = documented_tree()
    assert {"BridgeError", *parents} == set(STATUS)
    for name, parent in parents.items():
        assert getattr(errors, name).__bases__[0] is getattr(errors, parent), name


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_error_arrives_as_its_own_kind(kind: type[BridgeError]) -> None:
    """An error of each kind is decoded as that very kind, with its text, and has its one gRPC
    status."""
    received = travelled(kind("what, seen, expected: é 😀"))
    assert type(received) is kind
    assert str(received) == "what, seen, expected: é 😀"
    assert kind.status is grpc.StatusCode[STATUS[kind.__name__]]


@pytest.mark.parametrize(("name", "builtin"), BUILTIN_BASES.items(), ids=BUILTIN_BASES)
def test_error_is_also_what_python_would_raise(
    name: str, builtin: type[Exception]
) -> None:
    """Where Python has an exception for the situation, the bridge's error is one of that kind
    too."""
    assert issubclass(getattr(errors, name), builtin)


def test_remote_error_carries_type_and_traceback_as_text() -> None:
    """A RemoteModelError brings the remote class and traceback, and shows the traceback when it
    is printed."""
    received = travelled(
        RemoteModelError(
            "boom", remote_type="pkg.Error", remote_traceback="line 1\nline 2"
        )
    )
    assert isinstance(received, RemoteModelError)
    assert (received.args, received.remote_type, received.remote_traceback) == (
        ("boom",),
        "pkg.Error",
        "line 1\nline 2",
    )
    assert str(received) == "boom\n\nRemote traceback:\nline 1\nline 2"
    assert errors.encode(received) == errors.encode(travelled(received))


@pytest.mark.parametrize(
    "kind", ["", "Newer", "Exception", "KeyboardInterrupt", "os.system", "bridgeerror"]
)
def test_unknown_kind_becomes_a_plain_bridge_error(kind: str) -> None:
    """A kind that this side does not know, or that is no error of the bridge, is a BridgeError
    with the same text."""
    received = errors.decode(pb.Error(kind=kind, message="text"))
    assert type(received) is BridgeError and str(received) == "text"


def test_unexpected_exception_becomes_an_internal_error() -> None:
    """An unexpected exception is an InternalError that names the type and text."""
    error = errors.unexpected(ZeroDivisionError("division by zero"))
    assert type(error) is errors.InternalError
    assert "ZeroDivisionError: division by zero" in str(error)


@pytest.mark.parametrize(
    "kind", [errors.InternalError, RemoteModelError], ids=["plain", "remote"]
)
def test_text_that_utf_8_cannot_carry_still_arrives(kind: type[BridgeError]) -> None:
    """An error whose text has a lone surrogate, as file names may, is sent with that character
    replaced."""
    received = travelled(kind("bad name: \udcff.npy"))
    assert type(received) is kind
    assert str(received).startswith("bad name: ") and str(received).endswith(".npy")


def test_endless_text_fits_in_a_frame() -> None:
    """Of a text of any length, as of a model that shows its data, the beginning and the end
    arrive."""
    endless = "first" + "é" * (4 << 20) + "last"
    error = errors.encode(RemoteModelError(endless, remote_traceback=endless))
    assert len(error.SerializeToString()) < MAX_FRAME
    assert error.message.startswith("first") and error.message.endswith("last")
    assert "characters omitted here" in error.traceback


# Over gRPC ----------------------------------------------------------------------------------------


class Aborting(grpc.GenericRpcHandler):
    """Ends each call with the error that `Aborting.error` holds."""

    error: BridgeError

    def service(
        self, details: grpc.HandlerCallDetails
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        return grpc.unary_unary_rpc_method_handler(
            lambda request, context: errors.abort(context, self.error)
        )


@pytest.fixture(scope="module")
def aborting(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Aborting, grpc.Channel]]:
    """A gRPC server on a Unix socket that fails every call, and a channel to it."""
    path: Path = tmp_path_factory.mktemp("grpc") / "s"
    handler = Aborting()
    server = grpc.server(futures.ThreadPoolExecutor(1), handlers=(handler,))
    server.add_insecure_port(f"unix:{path}")
    server.start()
    with contextlib.closing(grpc.insecure_channel(f"unix:{path}")) as channel:
        received_over(
            (handler, channel),
            BridgeError("connect now, before what is open is counted"),
        )
        yield handler, channel
    server.stop(0).wait()


def received_over(
    aborting: tuple[Aborting, grpc.Channel], error: BridgeError
) -> tuple[BridgeError, grpc.StatusCode]:
    handler, channel = aborting
    handler.error = error
    with pytest.raises(grpc.RpcError) as raised:
        channel.unary_unary("/any/Method")(b"", timeout=10)
    return from_rpc(raised.value), raised.value.code()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_error_ends_a_grpc_call_with_its_kind_and_status(
    kind: type[BridgeError], aborting: tuple[Aborting, grpc.Channel]
) -> None:
    """A call that is aborted with an error arrives as that kind and text, under that kind's
    status."""
    received, status = received_over(aborting, kind("some text: é"))
    assert type(received) is kind and str(received) == "some text: é"
    assert status is kind.status


@pytest.mark.parametrize("length", [1_000, 10_000, 200_000])
def test_long_traceback_does_not_cost_the_error_its_kind(
    length: int, aborting: tuple[Aborting, grpc.Channel]
) -> None:
    """However long the remote traceback, the error arrives as a RemoteModelError with the
    beginning of its text."""
    error = RemoteModelError(
        "boom: " + "é" * length,
        remote_type="builtins.ValueError",
        remote_traceback="frame\n" * (length // 6),
    )
    received, status = received_over(aborting, error)
    assert isinstance(received, RemoteModelError), received
    assert status is grpc.StatusCode.ABORTED
    assert (
        received.args[0].startswith("boom: é")
        and received.remote_type == "builtins.ValueError"
    )
    assert "frame" in received.remote_traceback


def test_an_error_of_a_class_of_ones_own_arrives_as_the_bridges() -> None:
    """A subclass that only one side knows travels under the name of the class that both know."""

    class Special(errors.SpecError):
        pass

    assert type(errors.decode(errors.encode(Special("odd")))) is errors.SpecError
