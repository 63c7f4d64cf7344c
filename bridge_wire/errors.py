"""Errors of the bridge, and their encoding for the wire.

BridgeError
├── CallerError            the call is wrong; nothing was sent
│   ├── ArgumentError      an argument is missing, or the model takes none of that name
│   ├── SpecError          a leaf's shape or dtype does not match
│   ├── DTypeError         a dtype the worker cannot hold without loss
│   ├── StructureError     a pytree that cannot be sent
│   ├── CopyNeeded         copy=False, but a copy is needed
│   ├── UnknownModel       the worker hosts no model of this name
│   ├── TargetError        `mod:fn` names nothing that can be served
│   └── SessionClosed      the caller closed the session
├── RemoteModelError       the model raised; carries the remote type and traceback as text
├── PeerError              the other side broke the contract
│   ├── ProtocolError      a malformed or illegal message
│   ├── VersionMismatch    no protocol version in common
│   └── Unauthenticated    a wrong or missing token, or another user
├── WorldError             nobody's fault in this process
│   ├── WorkerUnavailable  no worker answers at the address
│   │   ├── WorkerDied     the worker died, or the connection broke, during a call
│   │   └── WorkerDraining the worker is shutting down
│   ├── WorkerBusy         too many calls wait for the worker; says when to try again
│   ├── WorkerCrashed      a spawned worker exited before it was ready
│   ├── StartupTimeout     a spawned worker was not ready in time
│   ├── CallTimeout        no answer within timeout_s
│   ├── OutOfMemory        no memory for a block: the slabs' cap, the kernel or the GPU refused
│   ├── CudaError          CUDA, or one of its handles, does not work here
│   ├── ModelChanged       the worker now hosts another model than during an earlier call
│   └── LaneUnavailable    the required lane or memory kind is unavailable
├── ResidualGone           the worker no longer has the residual; the caller recomputes
├── ProgramGone            the worker no longer has the program; the caller prepares it again
└── InternalError          a bug of the bridge
"""

import copy
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NoReturn

import grpc

from bridge_wire.pb import bridge_pb2 as pb

_Status = grpc.StatusCode

# The gRPC trailer with the pb.Error.
TRAILER = "bridge-error-bin"
# gRPC drops all trailers of a call above 8 KiB, and writes each non-ASCII byte of the details as
# three bytes.
_MAX_TRAILER = 4096
_MAX_DETAILS = 512
_LONGEST_PAUSE_S = 60.0
_MAX_TEXT = 1 << 18  # characters of one text: an error must fit in a frame


class BridgeError(Exception):
    """Root of all errors of this project."""

    status = _Status.UNKNOWN

    def reworded(self, message: str) -> "BridgeError":
        """Return a copy of this error with another message."""
        error = copy.copy(self)
        error.args = (message,)
        return error


class CallerError(BridgeError):
    """The call is wrong; nothing was sent."""

    status = _Status.INVALID_ARGUMENT


class ArgumentError(CallerError, TypeError):
    """An argument is missing, or the model's signature has no such argument."""


class SpecError(CallerError):
    """A leaf's shape or dtype does not match."""


class DTypeError(CallerError, TypeError):
    """A dtype that the worker cannot hold without loss."""


class StructureError(CallerError, TypeError):
    """A pytree, or a leaf of one, that cannot be sent."""


class CopyNeeded(CallerError, ValueError):
    """The caller forbade a copy, but a copy is needed."""


class UnknownModel(CallerError, LookupError):
    """The worker hosts no model of this name."""

    status = _Status.NOT_FOUND


class TargetError(CallerError):
    """A `mod:fn` that names nothing that can be served."""


class SessionClosed(CallerError):
    """The session was closed by its owner."""

    status = _Status.FAILED_PRECONDITION


class RemoteModelError(BridgeError):
    """The model raised.

    `remote_type` is the exception's qualified class name, `remote_traceback` its traceback as text.
    `request` names the failure in the worker's log; it is empty in process.
    """

    status = _Status.ABORTED

    def __init__(
        self,
        message: str,
        *,
        remote_type: str = "",
        remote_traceback: str = "",
        request: str = "",
    ) -> None:
        super().__init__(message)
        self.request = request
        self.remote_type = remote_type
        self.remote_traceback = remote_traceback

    def __str__(self) -> str:
        text = super().__str__()
        if not self.remote_traceback:
            return text
        where = f" ({self.request} in the worker's log)" if self.request else ""
        return f"{text}\n\nRemote traceback{where}:\n{self.remote_traceback}"


class PeerError(BridgeError):
    """The other side broke the contract."""

    status = _Status.FAILED_PRECONDITION


class ProtocolError(PeerError):
    """A malformed or illegal message."""

    status = _Status.INVALID_ARGUMENT


class VersionMismatch(PeerError):
    """The two sides have no protocol version in common."""


class Unauthenticated(PeerError):
    """A wrong or missing token, or a peer of another user."""

    status = _Status.UNAUTHENTICATED


class WorldError(BridgeError):
    """Something outside this process failed."""

    status = _Status.UNAVAILABLE


class WorkerUnavailable(WorldError, ConnectionError):
    """No worker answers at the address."""


class WorkerDied(WorkerUnavailable):
    """The worker died, or its connection broke, during a call. The next call reconnects."""


class WorkerDraining(WorkerUnavailable):
    """The worker is shutting down and accepts no new work."""


class WorkerBusy(WorldError):
    """Too many calls wait for the worker; this call has not run.

    `retry_after_s` is the worker's estimate of the seconds until it takes calls again.
    """

    status = _Status.RESOURCE_EXHAUSTED

    def __init__(self, message: str, *, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class WorkerCrashed(WorldError):
    """A spawned worker exited before it was ready."""


class StartupTimeout(WorldError, TimeoutError):
    """A spawned worker was not ready in time and was killed."""

    status = _Status.DEADLINE_EXCEEDED


class CallTimeout(WorldError, TimeoutError):
    """No answer within timeout_s.

    The call's blocks stay leased until the worker releases them.
    """

    status = _Status.DEADLINE_EXCEEDED


class OutOfMemory(WorldError, MemoryError):
    """No memory for a block: the slabs reached their cap, or the kernel or the GPU has no
    memory."""

    status = _Status.RESOURCE_EXHAUSTED


class CudaError(WorldError):
    """CUDA does not work here, or an operation failed, such as opening a handle."""


class ModelChanged(WorldError):
    """The worker was restarted with another model than during an earlier call."""

    status = _Status.FAILED_PRECONDITION


class LaneUnavailable(WorldError):
    """The required lane or memory kind is unavailable."""


class ResidualGone(BridgeError):
    """The worker no longer has the residual, after an eviction or a restart of the worker."""

    status = _Status.DATA_LOSS


class ProgramGone(BridgeError):
    """The worker no longer has the program, after an eviction; the request has not run."""

    status = _Status.DATA_LOSS


class InternalError(BridgeError):
    """A bug of the bridge; please report it."""

    status = _Status.INTERNAL


def _subclasses(root: type[BridgeError]) -> Iterator[type[BridgeError]]:
    yield root
    for child in root.__subclasses__():
        yield from _subclasses(child)


_BY_KIND: Mapping[str, type[BridgeError]] = MappingProxyType(
    {c.__name__: c for c in _subclasses(BridgeError)}
)


def encode(error: BridgeError) -> pb.Error:
    """Return the error as a message."""
    if isinstance(error, RemoteModelError):
        return pb.Error(
            kind="RemoteModelError",
            message=_utf8(str(error.args[0])),
            remote_type=_utf8(error.remote_type),
            traceback=_utf8(error.remote_traceback),
            request=error.request,
        )
    kind = next(
        each.__name__ for each in type(error).__mro__ if each.__name__ in _BY_KIND
    )
    message = pb.Error(kind=kind, message=_utf8(str(error)))
    if isinstance(error, WorkerBusy):
        message.retry_after_s = error.retry_after_s
    return message


def _shortened(text: str, nbytes: int = _MAX_TRAILER // 3) -> str:
    return text.encode()[:nbytes].decode(errors="ignore")


def _utf8(text: str) -> str:
    """Return valid UTF-8 of limited length: a model's text may contain lone surrogates, or all
    of its data."""
    if len(text) > _MAX_TEXT:
        half = _MAX_TEXT // 2
        text = f"{text[:half]}\n[{len(text) - 2 * half} characters omitted here]\n{text[-half:]}"
    return text.encode("utf-8", "backslashreplace").decode()


def decode(message: pb.Error) -> BridgeError:
    """Return the error of a message; an unknown kind becomes a plain BridgeError."""
    kind = _BY_KIND.get(message.kind, BridgeError)
    if kind is RemoteModelError:
        return RemoteModelError(
            message.message,
            remote_type=message.remote_type,
            remote_traceback=message.traceback,
            request=message.request,
        )
    if kind is WorkerBusy:
        return WorkerBusy(message.message, retry_after_s=_seconds(message))
    return kind(message.message)


def _seconds(message: pb.Error) -> float:
    """Return the pause that a busy worker asks for, within limits, as the peer may be hostile."""
    seconds = message.retry_after_s
    return min(seconds, _LONGEST_PAUSE_S) if seconds > 0 else 0.0


def unexpected(error: BaseException) -> InternalError:
    """Return the InternalError for an unexpected exception."""
    return InternalError(f"unexpected {type(error).__name__}: {error}")


def abort(context: grpc.ServicerContext, error: BridgeError) -> NoReturn:
    """Abort a gRPC call with the error's status and text, and the whole error in the trailer."""
    message = encode(error)
    message.message, message.traceback = (
        _shortened(message.message),
        _shortened(message.traceback),
    )
    context.set_trailing_metadata(((TRAILER, message.SerializeToString()),))
    context.abort(error.status, _shortened(message.message, _MAX_DETAILS))
    raise AssertionError("abort raises")
