"""A worker's endpoint: parsing of --listen, the default socket, and exposure to other hosts.

Imports no framework.
"""

import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path

from bridge_wire.addresses import (
    DEFAULT_SOCKET,
    LONGEST_SOCKET_PATH,
    is_loopback,
    socket_directories,
)
from bridge_wire.errors import CallerError

_LAST_PORT = 65535
LANE_SUFFIX = ".lane"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A gRPC endpoint and the Unix socket of its local lanes."""

    address: str  # in gRPC's form: "unix:PATH" or "HOST:PORT"
    lane_path: str
    is_exposed: bool  # whether other hosts may reach it


def parse(listen: str | None) -> Endpoint:
    """Return the endpoint of a --listen value; None means a socket in the runtime directory.

    Raises:
      CallerError: the value is malformed, or the socket's path is too long or exists and is not a
        socket.
    """
    if listen is None:
        return _unix(_runtime_directory() / DEFAULT_SOCKET)
    if listen.startswith("unix:"):
        return _unix(Path(listen.removeprefix("unix:")))
    host, _ = host_and_port(listen, "--listen", "neither unix:PATH nor HOST:PORT")
    directory = _runtime_directory()
    _remove_lanes_of_the_dead(directory)
    # One name per process, since several workers may listen on TCP.
    lane = directory / f"{os.getpid()}{LANE_SUFFIX}"
    return Endpoint(listen, str(lane), is_exposed=not is_loopback(host))


def host_and_port(text: str, flag: str, otherwise: str) -> tuple[str, int]:
    """Return the host and the port of "HOST:PORT".

    Raises:
      CallerError: the text, which was given by a flag, has another form.
    """
    if text.isdecimal():
        raise CallerError(
            f"{flag} {text!r} is {otherwise}; did you mean {f'127.0.0.1:{text}'!r}?"
        )
    if "://" in text:
        rest = text.partition("://")[2].strip("/")
        raise CallerError(f"{flag} {text!r} is a URL; did you mean {rest!r}?")
    host, colon, port = text.rpartition(":")
    if not (colon and host and port.isdecimal()):
        raise CallerError(f"{flag} {text!r} is {otherwise}")
    if int(port) > _LAST_PORT:
        raise CallerError(f"{flag} {text!r} has a port above the limit {_LAST_PORT}")
    return host, int(port)


def _unix(path: Path) -> Endpoint:
    path = path.absolute()
    if not str(path).isprintable():
        raise CallerError(
            f"the socket's path {str(path)!r} has unprintable characters; choose another --listen"
            " path"
        )
    if not _fits(path):
        raise CallerError(
            f"the socket's path exceeds {LONGEST_SOCKET_PATH - len(LANE_SUFFIX)} bytes: {path};"
            " choose a shorter --listen path"
        )
    _check_directory(path.parent)
    for taken in (path, Path(f"{path}{LANE_SUFFIX}")):
        if taken.exists() and not stat.S_ISSOCK(taken.stat().st_mode):
            raise CallerError(
                f"{taken} exists and is not a socket; choose another --listen path"
            )
    return Endpoint(f"unix:{path}", f"{path}{LANE_SUFFIX}", is_exposed=False)


def _check_directory(directory: Path) -> None:
    """Raise CallerError unless this process can create and remove sockets in a directory."""
    if not os.path.isdir(directory):
        raise CallerError(
            f"the socket's directory does not exist, or is below a directory that the user"
            f" {os.geteuid()} cannot enter: {directory}; create it first"
        )
    if os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
        return
    reason = (
        "is on a read-only file system"
        if os.statvfs(directory).f_flag & os.ST_RDONLY
        else f"is not writable by the user {os.geteuid()}"
    )
    raise CallerError(
        f"the socket's directory {directory} {reason}; choose another --listen path"
    )


def listens(path: str) -> bool:
    """Whether a process listens on a Unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:  # the listener's backlog is full
            return True
        except OSError:
            return False
    return True


def _fits(path: Path) -> bool:
    return len(os.fsencode(path)) + len(LANE_SUFFIX) <= LONGEST_SOCKET_PATH


def _runtime_directory() -> Path:
    """Return a directory that only this user can enter."""
    directories = socket_directories()
    usable = (
        directory
        for directory in directories
        if os.access(directory.parent, os.W_OK | os.X_OK)
    )
    directory = next(
        (directory for directory in usable if _fits(directory / DEFAULT_SOCKET)), None
    )
    if directory is None:
        parents = ", ".join(str(directory.parent) for directory in directories)
        raise CallerError(
            f"no directory for sockets: none of {parents} is writable and"
            " short enough; name a --listen"
        )
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise CallerError(
            f"cannot create the directory {directory} for sockets: {error.strerror}; name a"
            " --listen"
        ) from error
    status = directory.lstat()
    if (
        not stat.S_ISDIR(status.st_mode)
        or status.st_uid != os.geteuid()
        or status.st_mode & 0o077
    ):
        raise CallerError(
            f"{directory} is not a directory of this user with mode 0700; remove it or name a"
            " --listen"
        )
    _check_directory(directory)
    return directory


def _remove_lanes_of_the_dead(directory: Path) -> None:
    """Remove the sockets of killed TCP workers, since later workers use other names."""
    for lane in directory.glob(f"*{LANE_SUFFIX}"):
        pid = lane.name.removesuffix(LANE_SUFFIX)
        # The socket's worker may live in another PID namespace, such as a container's.
        if (
            pid.isdigit()
            and not Path(f"/proc/{pid}").exists()
            and not listens(str(lane))
        ):
            lane.unlink(missing_ok=True)
