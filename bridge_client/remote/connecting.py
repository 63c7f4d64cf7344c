"""`connect`, and `session_for`: the session of a function's target. Framework imports are local."""

import os
from typing import Any

from bridge_client.remote.link import Terms, Tls
from bridge_client.remote.retrying import Policy
from bridge_client.remote.session import Fixed, RemoteSession
from bridge_client.remote.worker_addresses import resolved
from bridge_client.session import Session
from bridge_wire.errors import CallerError

_LANES = (None, "local", "grpc")
_REQUIREMENTS = (None, "memfd", "cuda_ipc")


def connect(
    address: str | None = None,
    *,
    token: str | None = None,
    tls: Tls | bool | None = None,
    timeout_s: float | None = None,
    lane: str | None = None,
    require: str | None = None,
    wait_s: float = 0.0,
    retry_s: float = 30.0,
    retries: int = 0,
    require_revision: bool = False,
    token_file: str | os.PathLike[str] | None = None,
) -> RemoteSession:
    """Connect to the worker at "unix:PATH" or "HOST:PORT".

    Args:
      address: None is the socket of this user's worker without --listen; a path, such as
        "/run/bridge/bridge.sock", means "unix:PATH".
      token: the token of a worker with --token-file.
      tls: certificates; True trusts the system's authorities.
      timeout_s: seconds for each call; None waits.
      lane: forces "local" (Unix socket, shared memory) or "grpc" (inline bytes); the default is
        the fastest available lane.
      require: "memfd" or "cuda_ipc" makes any other memory kind an error instead of a logged
        fallback.
      wait_s: seconds to wait here for a worker that is still starting.
      retry_s: seconds that a later call waits while the worker drains, restarts or is busy; a call
        waits only if it has not run.
      retries: how often a call is repeated whose worker died under it, and which may have run. For
        models that are functions of their arguments, parameters, buffers and keys.
      require_revision: whether a worker with another --revision or changed models is an error
        (ModelChanged) instead of a warning.
      token_file: a file with the token, instead of `token`; read again at each connection.
    Raises:
      CallerError: an argument is malformed, or the token file cannot be read.
      WorkerUnavailable: no worker answers at the address.
      Unauthenticated: the token is wrong.
      LaneUnavailable: the required lane or memory kind is unavailable.
      VersionMismatch: the worker speaks another protocol.
    """
    endpoint = resolved(address)
    check_terms(lane, require)
    if token is not None and token_file is not None:
        raise CallerError("token= and token_file= exclude each other; pass one of them")
    terms = Terms(
        token,
        Tls() if tls is True else tls or None,
        lane,
        require,
        None if token_file is None else os.fspath(token_file),
        Policy(wait_s, retry_s, retries),
        require_revision,
    )
    return RemoteSession(Fixed(endpoint), terms, timeout_s)


def session_for(target: Any, framework: str) -> Session:
    """Return the session of a function's target.

    A target is a worker's address, a session, or a model of `framework` in this process.

    Raises:
      CallerError: the framework is not installed here.
    """
    if isinstance(target, str):
        return connect(target)
    if isinstance(target, Session):
        return target
    try:
        from bridge_client.inproc import host  # imports both frameworks
    except ImportError as error:
        raise CallerError(
            f"the target is a {type(target).__qualname__}; expected a worker's address or a"
            f" Session. To run a {framework} model in this process, install {framework} here"
            f" ({error})"
        ) from error
    return host(jax_model=target) if framework == "jax" else host(torch_model=target)


def check_terms(lane: str | None, require: str | None) -> None:
    """Raise CallerError for an unknown lane or memory kind."""
    if lane not in _LANES:
        raise CallerError(f"lane={lane!r}; expected 'local' or 'grpc'")
    if require not in _REQUIREMENTS:
        raise CallerError(f"require={require!r}; expected 'memfd' or 'cuda_ipc'")
